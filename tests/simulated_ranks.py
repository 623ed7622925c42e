"""Ranks in threads: the real code of every rank of a large world, with collectives in memory that count messages."""

import math
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.distributed import collectives, watched_group
from trainer.distributed.collectives import Group
from trainer.distributed.flight_recorder import FlightRecorder
from trainer.distributed.mesh import Mesh, mesh_of_groups
from trainer.distributed.rank_layout import Layout


@dataclass
class Traffic:
    """What one rank exchanges, by the usual algorithms: rings for large messages, trees for small ones."""

    messages: int = 0
    received_bytes: int = 0
    calls: Counter[str] = field(default_factory=Counter)

    def count(self, kind: str, *, size: int, num_bytes: int, is_root: bool = False) -> None:
        """Count a collective of `size` ranks, each with `num_bytes`."""
        depth = math.ceil(math.log2(size))
        self.calls[kind] += 1
        self.messages += {"all_reduce": 2 * depth, "gather": size - 1 if is_root else 1}.get(kind, depth)
        times = {"all_reduce": 2, "all_gather": size - 1, "gather": size - 1 if is_root else 0}.get(kind, 1)
        self.received_bytes += times * num_bytes


class _Meeting:
    """Combines values of the threads of a group, once for all of them; one meeting for each group of ranks."""

    def __init__(self, ranks: tuple[int, ...]) -> None:
        self.ranks = ranks
        self._values: list[Any] = [None] * len(ranks)
        self._combine: Callable[[list[Any]], Any] = list
        self._arrived = threading.Barrier(len(ranks), self._combined)
        self._left = threading.Barrier(len(ranks))  # nobody writes the next value before all have read
        self._patience_s = 100.0 + len(ranks)

    def exchange(self, index: int, value: Any, combine: Callable[[list[Any]], Any]) -> Any:
        """Return what `combine`, which is the same for all, makes of the values of all members."""
        self._values[index], self._combine = value, combine
        self._arrived.wait(self._patience_s)
        result = self._result
        self._left.wait(self._patience_s)
        return result

    def _combined(self) -> None:
        self._result = self._combine(self._values)

    def abort(self) -> None:
        """Free the threads that wait for one that has failed."""
        self._arrived.abort()
        self._left.abort()


@dataclass
class _Handle:
    """Stands for torch's process group of one rank."""

    meeting: _Meeting
    index: int
    ranks: tuple[int, ...]
    traffic: Traffic


class _Collectives:
    """Stands for torch.distributed in `trainer.distributed.collectives`."""

    ReduceOp, ProcessGroup, Work, DistError = dist.ReduceOp, dist.ProcessGroup, dist.Work, dist.DistError

    def get_backend(self, _: _Handle) -> str:
        """Return the backend whose tensors are on the CPU."""
        return "gloo"

    def all_reduce(self, x: Tensor, op: Any = dist.ReduceOp.SUM, *, group: _Handle) -> None:
        """Reduce x in place, in the order of the ranks."""

        def reduced(values: list[Tensor]) -> Tensor:
            stacked = torch.stack(values)
            return stacked.amax(0) if op == dist.ReduceOp.MAX else stacked.sum(0, dtype=x.dtype)

        x.copy_(_meet("all_reduce", group, x, reduced))

    def all_gather(self, parts: list[Tensor], x: Tensor, *, group: _Handle) -> None:
        """Fill parts with x of every member."""
        for part, value in zip(parts, _meet("all_gather", group, x), strict=True):
            part.copy_(value)

    def gather(self, x: Tensor, parts: list[Tensor] | None, _root: int, *, group: _Handle) -> None:
        """Fill parts of the first member."""
        values = _meet("gather", group, x)
        for part, value in zip(parts or (), values, strict=False):
            part.copy_(value)

    def broadcast(self, x: Tensor, root: int, *, group: _Handle) -> None:
        """Overwrite x with that of a rank."""
        x.copy_(_meet("broadcast", group, x)[group.ranks.index(root)])


def _meet(kind: str, group: _Handle, x: Tensor, combine: Callable[[list[Tensor]], Any] = list) -> Any:
    num_bytes = x.numel() * x.element_size()
    group.traffic.count(kind, size=len(group.ranks), num_bytes=num_bytes, is_root=group.index == 0)
    return group.meeting.exchange(group.index, x.clone(), combine)


class World:
    """Simulated ranks of one layout."""

    def __init__(self, world_size: int, **degrees: Any) -> None:
        self.size, self._degrees = world_size, degrees
        self.traffic = [Traffic() for _ in range(world_size)]
        self._meetings: dict[tuple[str, tuple[int, ...]], _Meeting] = {}
        self._meshes: dict[int, Mesh] = {}
        self._lock = threading.Lock()

    def run(self, function: Callable[[Mesh], Any]) -> list[Any]:
        """Return the result of a function on every rank; the first error is raised."""
        results: list[Any] = [None] * self.size
        errors: list[BaseException] = []

        def work(rank: int) -> None:
            try:
                results[rank] = function(self._mesh(rank))
            except BaseException as error:
                errors.append(error)
                with self._lock:
                    for meeting in self._meetings.values():
                        meeting.abort()

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(self.size)]
        with _in_memory():
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        if errors:
            raise next((error for error in errors if not isinstance(error, threading.BrokenBarrierError)), errors[0])
        return results

    def take_traffic(self) -> list[Traffic]:
        """Return what every rank has exchanged since this was asked last."""
        taken = [replace(one) for one in self.traffic]
        for one in self.traffic:
            one.messages, one.received_bytes, one.calls = 0, 0, Counter()
        return taken

    def _mesh(self, rank: int) -> Mesh:
        if rank not in self._meshes:
            self._meshes[rank] = self._new_mesh(rank)
        return self._meshes[rank]

    def _new_mesh(self, rank: int) -> Mesh:
        layout = Layout(world_size=self.size, rank=rank, **self._degrees)

        def group(name: str, members: Sequence[Sequence[int]]) -> Group:
            mine = tuple(next(ranks for ranks in members if rank in ranks))
            kind = "saving" if name == "saving" else ""
            with self._lock:
                if (kind, mine) not in self._meetings:
                    self._meetings[kind, mine] = _Meeting(mine)
                meeting = self._meetings[kind, mine]
            mine = meeting.ranks  # one tuple for all members
            handle: Any = _Handle(meeting, mine.index(rank), mine, self.traffic[rank])
            return Group(name, mine, me=rank, handle=handle if len(mine) > 1 else None, recorder=FlightRecorder())

        everyone = [list(range(self.size))]
        world = group("world", everyone)
        return mesh_of_groups(layout, group, world=world, host=world, saving=group("saving", everyone))


@contextmanager
def _in_memory() -> Iterator[None]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1.0)  # each thread that waits to run asks for its turn so often
    try:
        with patch.object(collectives, "dist", _Collectives()), patch.object(watched_group, "dist", _Collectives()):
            yield
    finally:
        sys.setswitchinterval(interval)
