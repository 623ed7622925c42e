"""Collectives on groups of ranks: the only module that calls those of torch.distributed, besides FSDP2.

A group of one rank communicates nothing and needs no process group, so that one process runs the same code as many.
Reductions are always SUM: nothing is averaged here, and no other code divides by a number of ranks. Only `differs`
asks for the largest.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from trainer.distributed.exchange import Arriving, Exchange, UnderWay
from trainer.distributed.flight_recorder import Operation
from trainer.distributed.watched_group import WatchedGroup
from trainer.distributed.wire_format import Plain, from_json, to_json
from trainer.errors import CommError


class Group(WatchedGroup):
    """A group of ranks. All methods are collective: every member must make the same calls in the same order."""

    def device_mesh(self, copies: "Group") -> DeviceMesh:
        """Return the group as a torch DeviceMesh for FSDP2; of two dimensions if there are copies of its shards.

        `copies` are the ranks with this rank's shard, one in each group of copies.

        Dimensions have the names of torch's groups: torch takes meshes for the same if their ranks and names are, and
        would go on with groups that were left, in a process that trains under one layout after another.
        """
        kind = self.device.type
        if copies.size == 1:
            return DeviceMesh.from_group(self.handle, kind, mesh_dim_names=(self.handle.group_name,))
        offsets = torch.tensor(self.ranks) - self.ranks[self.index]
        rows = torch.tensor(copies.ranks)[:, None] + offsets  # every group of copies has the same distances
        names = (copies.handle.group_name, self.handle.group_name)
        return DeviceMesh.from_group([copies.handle, self.handle], kind, mesh=rows, mesh_dim_names=names)

    def all_reduce_(self, x: Tensor) -> Tensor:
        """Sum x over the ranks, in place; the result is bitwise equal on every rank."""
        if self._handle is not None:
            with self._watched("all_reduce", [x.numel()]):
                dist.all_reduce(x, group=self._handle)
        return x

    def start_all_reduce(self, x: Tensor) -> "PendingOp":
        """Start an in-place all-reduce of x that overlaps with computation until its `wait`."""
        assert self._handle is not None, "a group of one has nothing to reduce"
        operation = self.recorder.note("all_reduce", self.name, [x.numel()])
        with self._reported(operation):
            work = dist.all_reduce(x, group=self._handle, async_op=True)
        assert work is not None, "this rank is in the group"
        return PendingOp(self, operation, work, x, x)

    def start_send(self, x: Tensor, *, target: int) -> "PendingOp":
        """Start to send x to a member, which receives it into a tensor of its shape."""
        operation = self.recorder.note("send", self.name, [x.numel()])
        with self._reported(operation):
            work = dist.isend(x, self.ranks[target], group=self._handle)
        assert work is not None, "this rank is in the group"
        return PendingOp(self, operation, work, x, x)

    def receive(self, x: Tensor, *, source: int) -> Tensor:
        """Overwrite x with what a member sends."""
        with self._watched("receive", [x.numel()]):
            dist.recv(x, self.ranks[source], group=self._handle)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """Return (size, *x.shape): x of every member; its shape must be the same on all."""
        if self._handle is None:
            return x[None].clone()
        parts = [torch.empty_like(x) for _ in self.ranks]
        with self._watched("all_gather", [x.numel()]):
            dist.all_gather(parts, x.contiguous(), group=self._handle)
        return torch.stack(parts)

    def gather(self, x: Tensor) -> Tensor | None:
        """Return what `all_gather` does on the first member; None on the others."""
        if self._handle is None:
            return x[None].clone()
        parts = [torch.empty_like(x) for _ in self.ranks] if self.index == 0 else None
        with self._watched("gather", [x.numel()]):
            dist.gather(x.contiguous(), parts, self.ranks[0], group=self._handle)
        return None if parts is None else torch.stack(parts)

    def broadcast_(self, x: Tensor, *, source: int = 0) -> Tensor:
        """Overwrite x with that of member `source`."""
        if self._handle is not None:
            with self._watched("broadcast", [x.numel()]):
                dist.broadcast(x, self.ranks[source], group=self._handle)
        return x

    def agrees(self, value: Plain) -> bool:
        """Return whether all members have the same value, on all of them; each sends a hash, whatever its size."""
        digest = hashlib.blake2b(to_json(value), digest_size=8).digest()
        return not self.differs(torch.tensor([int.from_bytes(digest, "big") >> 1], device=self.device)).any()

    def differs(self, x: Tensor) -> Tensor:
        """Return where integers x are not the same on all members, on all of them."""
        ends = torch.stack([x, ~x])  # of which the largest, and the opposite of the smallest, are asked for
        if self._handle is not None:
            with self._watched("compare", [ends.numel()]):
                dist.all_reduce(ends, dist.ReduceOp.MAX, group=self._handle)
        return ends[0] != ~ends[1]

    def any(self, holds: bool) -> bool:
        """Return whether something holds on a member."""
        return bool(self.all_reduce_(torch.tensor([int(holds)], device=self.device)).item())

    def all_gather_objects(self, value: Plain) -> list[Any]:
        """Return the values of all members, sent as JSON (see `wire_format`); for small values. Tuples become lists.

        What a rank receives grows with the ranks: for a few bytes each, or where something has gone wrong.
        """
        if self._handle is None:
            return [from_json(to_json(value))]
        with self._object_message("all_gather_object", value) as mine:
            parts = [torch.empty_like(mine) for _ in self.ranks]
            dist.all_gather(parts, mine, group=self._handle)
        return [self._read(part, i) for i, part in enumerate(parts)]

    def gather_objects(self, value: Plain) -> list[Any] | None:
        """Return what `all_gather_objects` does on the first member; None on the others."""
        if self._handle is None:
            return [from_json(to_json(value))]
        with self._object_message("gather_object", value) as mine:
            parts = [torch.empty_like(mine) for _ in self.ranks] if self.index == 0 else None
            dist.gather(mine, parts, self.ranks[0], group=self._handle)
        return None if parts is None else [self._read(part, i) for i, part in enumerate(parts)]

    @contextmanager
    def _object_message(self, name: str, value: Plain) -> Iterator[Tensor]:
        """Yield a value as JSON, with spaces up to the length of the longest member's; inside, it is exchanged."""
        data = to_json(value)
        with self._watched(name, [len(data)]):
            longest = torch.tensor([len(data)], device=self.device)
            dist.all_reduce(longest, dist.ReduceOp.MAX, group=self._handle)
            padded = bytearray(data.ljust(int(longest)))
            yield torch.frombuffer(padded, dtype=torch.uint8).to(self.device)

    def broadcast_object(self, value: Plain) -> Any:
        """Return the first member's value, sent as JSON (see `wire_format`); for values that may be large."""
        data = to_json(value) if self.index == 0 else b""
        if self._handle is None:
            return from_json(data)
        size = torch.tensor([len(data)], device=self.device)
        with self._watched("broadcast_object", [len(data)]):
            dist.broadcast(size, self.ranks[0], group=self._handle)
            whole = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(int(size)).byte()
            whole = whole.to(self.device)
            dist.broadcast(whole, self.ranks[0], group=self._handle)
        return self._read(whole, 0)

    def all_to_all(self, x: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        """Send the first send[0] rows of x to member 0, the next send[1] to member 1 and so on; differentiable.

        Both sides must pass matching sizes: gloo does not notice if a receiver expects more than was sent.

        Shapes: x (sum(send), ...) -> (sum(receive), ...) ordered by member.
        """
        return self.start_all_to_all(x, send, receive).wait()

    def start_all_to_all(self, x: Tensor, send: Sequence[int], receive: Sequence[int]) -> "AllToAll":
        """Start an `all_to_all` that overlaps with computation until its `wait`, forward and backward."""
        assert sum(send) == len(x), f"{sum(send)} rows to send, {len(x)} rows there"
        return AllToAll(x if self.size == 1 else UnderWay.start(RowsExchange(self, send, receive), x))

    def issue_all_to_all(self, x: Tensor, send: Sequence[int], receive: Sequence[int]) -> "PendingOp":
        """Start an all-to-all outside autograd."""
        out, x = x.new_empty(sum(receive), *x.shape[1:]), x.contiguous()
        operation = self.recorder.note("all_to_all", self.name, send)
        with self._reported(operation):
            work = dist.all_to_all_single(out, x, list(receive), list(send), group=self._handle, async_op=True)
        assert work is not None, "this rank is in the group"
        return PendingOp(self, operation, work, x, out)

    def start_shift(self, x: Tensor) -> "PendingOp":
        """Start to send x (n,) to the next member, and to receive that of the one before; outside autograd.

        The first member is next to the last; x must be of the same length on all.
        """
        near = (self.index + 1) % self.size, (self.index - 1) % self.size
        send, receive = ([x.numel() if member == to else 0 for member in range(self.size)] for to in near)
        return self.issue_all_to_all(x, send, receive)

    def _read(self, data: Tensor, source: int) -> Any:
        try:
            return from_json(data.cpu().numpy().tobytes())
        except (ValueError, RecursionError) as error:
            what = f"rank {self.ranks[source]} sent invalid JSON"
            raise CommError(self._failure(self.recorder.operations[-1], what)) from error


class AllToAll(NamedTuple):
    """An all-to-all in progress, forward and backward; a group of one has its rows already."""

    rows: Tensor | UnderWay

    def wait(self) -> Tensor:
        """Return (sum(receive), ...) ordered by member. Call it once."""
        return self.rows.wait()[0] if isinstance(self.rows, UnderWay) else self.rows


@dataclass(frozen=True, slots=True)
class PendingOp:
    """A collective in progress."""

    group: Group
    operation: Operation
    work: dist.Work
    x: Tensor
    """Input, kept alive until it has been sent."""
    out: Tensor

    def wait(self) -> Tensor:
        """Wait for the collective and return its result."""
        with self.group.awaited(self.operation):
            self.work.wait()
        return self.out

    def arriving(self) -> Arriving:
        """Return the tensor that it fills."""
        return Arriving((self.out,), self.wait)


class RowsExchange(Exchange):
    """Sizes of an all-to-all, whose gradient is one with both exchanged."""

    def __init__(self, group: Group, to: Sequence[int], of: Sequence[int]) -> None:
        super().__init__()
        self._group, self._to, self._of = group, tuple(to), tuple(of)

    def send(self, *tensors: Tensor) -> Arriving:
        """Start to send rows."""
        return self._group.issue_all_to_all(tensors[0], self._to, self._of).arriving()

    def send_back(self, *gradients: Tensor) -> Arriving:
        """Start to send the gradient of rows."""
        return self._group.issue_all_to_all(gradients[0], self._of, self._to).arriving()
