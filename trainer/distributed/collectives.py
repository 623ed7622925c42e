"""Every collective but those of FSDP2: the only module that calls torch.distributed to exchange anything.

A group of one rank exchanges nothing and needs no process group, so that one process runs the same code as many.
All sums are SUM: nothing is ever averaged here, and nobody else divides by a number of ranks.
"""

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
    """Ranks that exchange tensors with each other. Every one of them must make the same calls in the same order."""

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
        """Describe a group.

        Args:
            name: for messages.
            ranks: its members' numbers in the world, in order.
            me: this rank's number in the world.
            handle: torch's group; None for a group of one.
            recorder: where this rank's collectives are written down.
            watch: tells who is alive, where somebody watches.
        """
        assert (handle is None) == (len(ranks) == 1)
        self.name, self.ranks, self.index = name, tuple(ranks), ranks.index(me)
        self._handle, self.recorder, self.watch = handle, recorder, watch

    @classmethod
    def of_one(cls, recorder: FlightRecorder | None = None) -> "Group":
        """Return a group with nobody else in it."""
        return cls("world", [0], me=0, handle=None, recorder=recorder or FlightRecorder())

    @property
    def device(self) -> torch.device:
        """Device that tensors must be on to be exchanged."""
        is_nccl = self._handle is not None and dist.get_backend(self._handle) == "nccl"
        return torch.device("cuda", torch.cuda.current_device()) if is_nccl else torch.device("cpu")

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.ranks)

    @property
    def handle(self) -> dist.ProcessGroup:
        """Torch's own group, for a library that exchanges by itself."""
        assert self._handle is not None, "nobody to share with"
        return self._handle

    def device_mesh(self) -> DeviceMesh:
        """Return the same ranks in the form that torch's FSDP takes."""
        return DeviceMesh.from_group(self.handle, self.device.type)

    def all_reduce_(self, x: Tensor) -> Tensor:
        """Add up x over the ranks, in place; every rank gets bitwise the same."""
        if self._handle is not None:
            with self._watched("all_reduce", [x.numel()]):
                dist.all_reduce(x, group=self._handle)
        return x

    def start_all_reduce(self, x: Tensor) -> "PendingOp":
        """Start an in-place all-reduce of x, which overlaps with computation until it is waited for."""
        assert self._handle is not None, "nobody to add up with"
        operation = self.recorder.note("all_reduce", self.name, [x.numel()])
        with self._reported(operation):
            work = dist.all_reduce(x, group=self._handle, async_op=True)
        assert work is not None, "this rank is in the group"
        return PendingOp(self, operation, work, x, x)

    def all_gather(self, x: Tensor) -> Tensor:
        """Return (size, *x.shape): everybody's x, which has the same shape everywhere."""
        if self._handle is None:
            return x[None].clone()
        parts = [torch.empty_like(x) for _ in self.ranks]
        with self._watched("all_gather", [x.numel()]):
            dist.all_gather(parts, x.contiguous(), group=self._handle)
        return torch.stack(parts)

    def broadcast_(self, x: Tensor, *, source: int = 0) -> Tensor:
        """Overwrite x by that of member `source`."""
        if self._handle is not None:
            with self._watched("broadcast", [x.numel()]):
                dist.broadcast(x, self.ranks[source], group=self._handle)
        return x

    def all_gather_objects(self, value: Plain) -> list[Any]:
        """Return everybody's value, as JSON on the way (see `plain`): for what is small; tuples come back as lists.

        Raises:
            TypeError: if it is no plain value.
        """
        data = to_json(value)
        if self._handle is None:
            return [from_json(data)]
        mine = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(self.device)
        with self._watched("all_gather_object", [len(mine)]):
            sizes = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in self.ranks]
            dist.all_gather(sizes, sizes[0] + len(mine), group=self._handle)
            room = max(map(int, sizes))
            parts = [mine.new_empty(room) for _ in self.ranks]
            dist.all_gather(parts, torch.nn.functional.pad(mine, (0, room - len(mine))), group=self._handle)
        sent = [_bytes_of(part[: int(size)]) for part, size in zip(parts, sizes, strict=True)]
        return [self._read(data, source) for source, data in enumerate(sent)]

    def broadcast_object(self, value: Plain) -> Any:
        """Return the first member's value, as JSON on the way (see `plain`): for what may be large.

        Raises:
            TypeError: if it is no plain value.
        """
        data = to_json(value) if self.index == 0 else b""
        if self._handle is None:
            return from_json(data)
        size = torch.tensor([len(data)], device=self.device)
        with self._watched("broadcast_object", [len(data)]):
            dist.broadcast(size, self.ranks[0], group=self._handle)
            whole = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(int(size)).byte()
            whole = whole.to(self.device)
            dist.broadcast(whole, self.ranks[0], group=self._handle)
        return self._read(_bytes_of(whole), 0)

    def all_to_all(self, x: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        """Send the first send[0] rows of x to member 0, the next send[1] to member 1 and so on; differentiable.

        Both sides must know the sizes: gloo does not notice a receiver that expects more than was sent.

        Args:
            x: (sum(send), ...).
            send: rows for each member.
            receive: rows from each member.

        Returns:
            (sum(receive), ...) in the order of the members.
        """
        return self.start_all_to_all(x, send, receive).wait()

    def start_all_to_all(self, x: Tensor, send: Sequence[int], receive: Sequence[int]) -> "AllToAll":
        """Start an `all_to_all`, which overlaps with computation until its `wait`, forward and backward."""
        assert sum(send) == len(x), f"{sum(send)} rows to send, {len(x)} rows there"
        return AllToAll(x, self, tuple(send), tuple(receive))

    def issue_all_to_all(self, x: Tensor, send: Sequence[int], receive: Sequence[int]) -> "PendingOp":
        """Begin to exchange rows, outside autograd."""
        out, x = x.new_empty(sum(receive), *x.shape[1:]), x.contiguous()
        operation = self.recorder.note("all_to_all", self.name, send)
        with self._reported(operation):
            work = dist.all_to_all_single(out, x, list(receive), list(send), group=self._handle, async_op=True)
        assert work is not None, "this rank is in the group"
        return PendingOp(self, operation, work, x, out)

    def _read(self, data: bytes, source: int) -> Any:
        try:
            return from_json(data)
        except (ValueError, RecursionError) as error:
            last = self.recorder.operations[-1]
            raise CommError(
                f"rank {self.ranks[self.index]}: {last} failed at step {self.recorder.step}: rank {self.ranks[source]} "
                f"has sent what is no JSON"
            ) from error

    @contextmanager
    def _watched(self, name: str, sizes: Sequence[int]) -> Iterator[None]:
        operation = self.recorder.note(name, self.name, sizes)
        with self.awaited(operation):
            yield

    @contextmanager
    def awaited(self, operation: Operation) -> Iterator[None]:
        """Write down that an operation is waited for; if it fails it stays the one where the rank gave up."""
        self.recorder.wait_for(operation)
        with self._reported(operation):
            yield
        self.recorder.end()

    @contextmanager
    def _reported(self, operation: Operation) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise CommError(
                f"rank {self.ranks[self.index]}: {operation} failed at step {self.recorder.step}: "
                f"{backend_reason(error)}"
            ) from error


class AllToAll:
    """An all-to-all in progress. Backward, its gradient is in flight from where `wait` was to where it began."""

    def __init__(self, x: Tensor, group: Group, send: tuple[int, ...], receive: tuple[int, ...]) -> None:
        self.group, self.send, self.receive = group, send, receive
        self.pending: PendingOp | None = None
        self._sent: Tensor | None = x if group.size == 1 else _Send.apply(x, self)

    def wait(self) -> Tensor:
        """Return (sum(receive), ...) in the order of the members. Only once."""
        sent, self._sent = self._sent, None  # it hangs on this exchange, which must not hang on it as well
        assert sent is not None
        return sent if self.group.size == 1 else _Receive.apply(sent, self)

    def received(self) -> Tensor:
        """Wait for the rows of the last message, and return them."""
        assert self.pending is not None
        pending, self.pending = self.pending, None
        return pending.wait()


@dataclass(frozen=True, slots=True)
class PendingOp:
    """A collective operation in progress."""

    group: Group
    operation: Operation
    work: dist.Work
    x: Tensor
    """Kept until it has been sent."""
    out: Tensor

    def wait(self) -> Tensor:
        """Wait for the operation, and return its result."""
        with self.group.awaited(self.operation):
            self.work.wait()
        return self.out


class _Send(torch.autograd.Function):
    """Rows begin to travel. Backward, their gradient is waited for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: AllToAll) -> Tensor:
        ctx.exchange = exchange
        exchange.pending = exchange.group.issue_all_to_all(x, exchange.send, exchange.receive)
        return x.view_as(x)  # what `_Receive` hangs on

    @staticmethod
    @once_differentiable
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange.received(), None


class _Receive(torch.autograd.Function):
    """Rows are waited for. Backward, their gradient begins to travel; `_Send` alone may look at what is returned."""

    @staticmethod
    def forward(ctx: Any, sent: Tensor, exchange: AllToAll) -> Tensor:
        ctx.exchange = exchange
        return exchange.received()

    @staticmethod
    @once_differentiable
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        exchange: AllToAll = ctx.exchange
        assert exchange.pending is None, "its gradient is under way already"
        exchange.pending = exchange.group.issue_all_to_all(grad, exchange.receive, exchange.send)
        return exchange.pending.out, None


def _bytes_of(x: Tensor) -> bytes:
    return x.cpu().numpy().tobytes()


def is_collective_error(error: BaseException) -> bool:
    """Tell whether an error comes from an exchange that a library makes by itself, as FSDP and DeepSpeed do."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "/gloo/" in str(error))


def backend_reason(error: BaseException) -> str:
    """Return what the backend says is wrong, without its own source line and advice."""
    first = first_line(error).partition(" This is typically")[0]
    return re.sub(r"^\[\S*?:\d+\] ", "", first)
