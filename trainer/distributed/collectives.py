"""Collectives on groups of ranks: the only module that calls those of torch.distributed, besides FSDP2.

A group of one rank communicates nothing and needs no process group, so that one process runs the same code as many.
Reductions are always SUM: nothing is averaged here, and no other code divides by a number of ranks. Only `agrees`,
which compares, asks for the largest.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh

from trainer.distributed.flight_recorder import FlightRecorder, Operation
from trainer.distributed.watchdog import Watchdog
from trainer.distributed.wire_format import Plain, from_json, to_json
from trainer.errors import CommError, first_line


class Group:
    """A group of ranks. All methods are collective: every member must make the same calls in the same order.

    `ranks` are the global ranks of its members, in order, `me` that of this process. `handle` is torch's process group;
    None for a group of one.
    """

    def __init__(
        self,
        name: str,
        ranks: Sequence[int],
        *,
        me: int,
        handle: dist.ProcessGroup | None,
        recorder: FlightRecorder,
        watch: Watchdog | None = None,
    ) -> None:
        assert (handle is None) == (len(ranks) == 1)
        self.name, self.ranks, self.index = name, tuple(ranks), ranks.index(me)
        self._handle, self.recorder, self.watch = handle, recorder, watch

    @classmethod
    def of_one(cls, recorder: FlightRecorder | None = None) -> "Group":
        """Return a group of this process alone."""
        return cls("world", [0], me=0, handle=None, recorder=recorder or FlightRecorder())

    @property
    def device(self) -> torch.device:
        """Device that tensors must be on."""
        is_nccl = self._handle is not None and dist.get_backend(self._handle) == "nccl"
        return torch.device("cuda", torch.cuda.current_device()) if is_nccl else torch.device("cpu")

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.ranks)

    @property
    def handle(self) -> dist.ProcessGroup:
        """Torch's process group, for libraries that communicate by themselves."""
        assert self._handle is not None, "a group of one has no process group"
        return self._handle

    def device_mesh(self, copies: "Group") -> DeviceMesh:
        """Return the group as a torch DeviceMesh for FSDP2; of two dimensions if there are copies of its shards.

        `copies` are the ranks with this rank's shard, one in each group of copies.
        """
        kind = self.device.type
        if copies.size == 1:
            return DeviceMesh.from_group(self.handle, kind)
        offsets = torch.tensor(self.ranks) - self.ranks[self.index]
        rows = torch.tensor(copies.ranks)[:, None] + offsets  # every group of copies has the same distances
        names = ("copy", "shard")
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

    def all_gather(self, x: Tensor) -> Tensor:
        """Return (size, *x.shape): x of every member; its shape must be the same on all."""
        if self._handle is None:
            return x[None].clone()
        parts = [torch.empty_like(x) for _ in self.ranks]
        with self._watched("all_gather", [x.numel()]):
            dist.all_gather(parts, x.contiguous(), group=self._handle)
        return torch.stack(parts)

    def broadcast_(self, x: Tensor, *, source: int = 0) -> Tensor:
        """Overwrite x with that of member `source`."""
        if self._handle is not None:
            with self._watched("broadcast", [x.numel()]):
                dist.broadcast(x, self.ranks[source], group=self._handle)
        return x

    def agrees(self, value: Plain) -> bool:
        """Return whether all members have the same value, on all of them; each sends a hash, whatever its size."""
        if self._handle is None:
            return True
        digest = hashlib.blake2b(to_json(value), digest_size=8).digest()
        mine = int.from_bytes(digest, "big") >> 2
        ends = torch.tensor([mine, -mine], device=self.device)
        with self._watched("compare", [len(ends)]):
            dist.all_reduce(ends, dist.ReduceOp.MAX, group=self._handle)
        largest, negated_smallest = ends.tolist()
        return largest == -negated_smallest

    def any(self, holds: bool) -> bool:
        """Return whether something holds on a member."""
        return bool(self.all_reduce_(torch.tensor([int(holds)], device=self.device)).item())

    def all_gather_objects(self, value: Plain) -> list[Any]:
        """Return the values of all members, sent as JSON (see `wire_format`); for small values. Tuples become lists.

        What a rank receives grows with the ranks: for a few bytes each, or where something has gone wrong.
        """
        data = to_json(value)
        if self._handle is None:
            return [from_json(data)]
        mine = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(self.device)
        with self._watched("all_gather_object", [len(mine)]):
            sizes = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in self.ranks]
            dist.all_gather(sizes, sizes[0] + len(mine), group=self._handle)
            longest = max(map(int, sizes))
            parts = [mine.new_empty(longest) for _ in self.ranks]
            dist.all_gather(parts, torch.nn.functional.pad(mine, (0, longest - len(mine))), group=self._handle)
        return [self._read(part[: int(size)], i) for i, (part, size) in enumerate(zip(parts, sizes, strict=True))]

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
        return AllToAll(x, self, tuple(send), tuple(receive))

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

    @contextmanager
    def _watched(self, name: str, sizes: Sequence[int]) -> Iterator[None]:
        with self.awaited(self.recorder.note(name, self.name, sizes)):
            yield

    @contextmanager
    def awaited(self, operation: Operation) -> Iterator[None]:
        """Record a wait for an operation. If it fails, the flight recorder keeps it as the running one."""
        self.recorder.wait_for(operation)
        with self._reported(operation):
            yield
        self.recorder.end()

    @contextmanager
    def _reported(self, operation: Operation) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise CommError(self._failure(operation, backend_reason(error))) from error

    def _failure(self, operation: Operation, reason: str) -> str:
        return f"rank {self.ranks[self.index]}: {operation} failed at step {self.recorder.step}: {reason}"


class AllToAll:
    """An all-to-all in progress. Backward, the gradient is in flight from the node of `wait` to that of the start."""

    def __init__(self, x: Tensor, group: Group, send: tuple[int, ...], receive: tuple[int, ...]) -> None:
        self.group, self.send, self.receive = group, send, receive
        self.pending: PendingOp | None = None
        self._sent: Tensor | None = x if group.size == 1 else _Send.apply(x, self)

    def wait(self) -> Tensor:
        """Return (sum(receive), ...) ordered by member. Call it once."""
        sent, self._sent = self._sent, None  # its graph refers to this object: break the cycle
        assert sent is not None
        return sent if self.group.size == 1 else _Receive.apply(sent, self)

    def received(self) -> Tensor:
        """Wait for the pending all-to-all and return the received rows."""
        assert self.pending is not None
        pending, self.pending = self.pending, None
        return pending.wait()


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


class _Send(torch.autograd.Function):
    """Start to send rows. Backward waits for their gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: AllToAll) -> Tensor:
        ctx.exchange = exchange
        exchange.pending = exchange.group.issue_all_to_all(x, exchange.send, exchange.receive)
        return x.view_as(x)  # makes `_Receive` depend on this node

    @staticmethod
    @once_differentiable
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange.received(), None


class _Receive(torch.autograd.Function):
    """Wait for rows. Backward starts to send their gradient and returns its buffer, which only `_Send` may read."""

    @staticmethod
    def forward(ctx: Any, sent: Tensor, exchange: AllToAll) -> Tensor:
        ctx.exchange = exchange
        return exchange.received()

    @staticmethod
    @once_differentiable
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        exchange: AllToAll = ctx.exchange
        assert exchange.pending is None, "its gradient is already in flight"
        exchange.pending = exchange.group.issue_all_to_all(grad, exchange.receive, exchange.send)
        return exchange.pending.out, None


def is_collective_error(error: BaseException) -> bool:
    """Return whether an error comes from a collective that a library issues itself, as FSDP and DeepSpeed do."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "/gloo/" in str(error))


def backend_reason(error: BaseException) -> str:
    """Return the backend's error message, without its source line and advice."""
    first = first_line(error).partition(" This is typically")[0]
    return re.sub(r"^\[\S*?:\d+\] ", "", first)
