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

from trainer.distributed.flight_recorder import Journal, Operation
from trainer.distributed.plain import Plain, from_json, to_json
from trainer.distributed.watchdog import Watch
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
        journal: Journal,
        watch: Watch | None = None,
    ) -> None:
        """Describe a group.

        Args:
            name: for messages.
            ranks: its members' numbers in the world, in order.
            me: this rank's number in the world.
            handle: torch's group; None for a group of one.
            journal: where this rank's collectives are written down.
            watch: tells who is alive, where somebody watches.
        """
        assert (handle is None) == (len(ranks) == 1)
        self.name, self.ranks, self.index = name, tuple(ranks), ranks.index(me)
        self._handle, self.journal, self.watch = handle, journal, watch

    @classmethod
    def of_one(cls, journal: Journal | None = None) -> "Group":
        """Return a group with nobody else in it."""
        return cls("world", [0], me=0, handle=None, journal=journal or Journal())

    @property
    def device(self) -> torch.device:
        """Where tensors must be to be exchanged."""
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

    def sum_(self, x: Tensor) -> Tensor:
        """Add up x over the ranks, in place; every rank gets bitwise the same."""
        if self._handle is not None:
            with self._watched("sum", [x.numel()]):
                dist.all_reduce(x, group=self._handle)
        return x

    def start_sum(self, x: Tensor) -> "Flight":
        """Begin to add up x over the ranks, in place, and let it go on behind what is computed until it is landed."""
        assert self._handle is not None, "nobody to add up with"
        operation = self.journal.note("sum", self.name, [x.numel()])
        with self._reported(operation):
            work = dist.all_reduce(x, group=self._handle, async_op=True)
        assert work is not None, "this rank is in the group"
        return Flight(self, operation, work, x, x)

    def gather(self, x: Tensor) -> Tensor:
        """Return (size, *x.shape): everybody's x, which has the same shape everywhere."""
        if self._handle is None:
            return x[None].clone()
        parts = [torch.empty_like(x) for _ in self.ranks]
        with self._watched("gather", [x.numel()]):
            dist.all_gather(parts, x.contiguous(), group=self._handle)
        return torch.stack(parts)

    def broadcast_(self, x: Tensor, *, source: int = 0) -> Tensor:
        """Overwrite x by that of member `source`."""
        if self._handle is not None:
            with self._watched("broadcast", [x.numel()]):
                dist.broadcast(x, self.ranks[source], group=self._handle)
        return x

    def gather_objects(self, value: Plain) -> list[Any]:
        """Return everybody's value, as JSON on the way (see `plain`): for what is small; tuples come back as lists.

        Raises:
            TypeError: if it is no plain value.
        """
        data = to_json(value)
        if self._handle is None:
            return [from_json(data)]
        mine = torch.frombuffer(bytearray(data), dtype=torch.uint8).to(self.device)
        with self._watched("gather_objects", [len(mine)]):
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

    def exchange(self, x: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        """Send the first send[0] rows of x to member 0, the next send[1] to member 1 and so on; differentiable.

        Both sides must know the sizes: gloo does not notice a receiver that expects more than was sent.

        Args:
            x: (sum(send), ...).
            send: rows for each member.
            receive: rows from each member.

        Returns:
            (sum(receive), ...) in the order of the members.
        """
        return self.start_exchange(x, send, receive).wait()

    def start_exchange(self, x: Tensor, send: Sequence[int], receive: Sequence[int]) -> "Exchange":
        """Begin an `exchange`, and let it go on behind what is computed until its `wait`; so does its way back."""
        assert sum(send) == len(x), f"{sum(send)} rows to send, {len(x)} rows there"
        return Exchange(x, self, tuple(send), tuple(receive))

    def launch(self, x: Tensor, send: Sequence[int], receive: Sequence[int]) -> "Flight":
        """Begin to exchange rows, outside autograd."""
        out, x = x.new_empty(sum(receive), *x.shape[1:]), x.contiguous()
        operation = self.journal.note("exchange", self.name, send)
        with self._reported(operation):
            work = dist.all_to_all_single(out, x, list(receive), list(send), group=self._handle, async_op=True)
        assert work is not None, "this rank is in the group"
        return Flight(self, operation, work, x, out)

    def _read(self, data: bytes, source: int) -> Any:
        try:
            return from_json(data)
        except (ValueError, RecursionError) as error:
            last = self.journal.operations[-1]
            raise CommError(
                f"rank {self.ranks[self.index]}: {last} failed at step {self.journal.step}: rank {self.ranks[source]} "
                f"has sent what is no JSON"
            ) from error

    @contextmanager
    def _watched(self, name: str, sizes: Sequence[int]) -> Iterator[None]:
        operation = self.journal.note(name, self.name, sizes)
        with self.awaited(operation):
            yield

    @contextmanager
    def awaited(self, operation: Operation) -> Iterator[None]:
        """Write down that an operation is waited for; if it fails it stays the one where the rank gave up."""
        self.journal.wait_for(operation)
        with self._reported(operation):
            yield
        self.journal.end()

    @contextmanager
    def _reported(self, operation: Operation) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise CommError(
                f"rank {self.ranks[self.index]}: {operation} failed at step {self.journal.step}: {reason_of(error)}"
            ) from error


class Exchange:
    """An exchange that has begun. Backward, the gradient is under way from where `wait` was to where it began."""

    def __init__(self, x: Tensor, group: Group, send: tuple[int, ...], receive: tuple[int, ...]) -> None:
        self.group, self.send, self.receive = group, send, receive
        self.flight: Flight | None = None
        self._sent: Tensor | None = x if group.size == 1 else _Depart.apply(x, self)

    def wait(self) -> Tensor:
        """Return (sum(receive), ...) in the order of the members. Only once."""
        sent, self._sent = self._sent, None  # it hangs on this exchange, which must not hang on it as well
        assert sent is not None
        return sent if self.group.size == 1 else _Arrive.apply(sent, self)

    def land(self) -> Tensor:
        """Return what was launched last, once it is there."""
        assert self.flight is not None
        flight, self.flight = self.flight, None
        return flight.land()


@dataclass(frozen=True, slots=True)
class Flight:
    """An operation that has begun."""

    group: Group
    operation: Operation
    work: dist.Work
    x: Tensor
    """Kept until it has been sent."""
    out: Tensor

    def land(self) -> Tensor:
        """Return its result, once it is there."""
        with self.group.awaited(self.operation):
            self.work.wait()
        return self.out


class _Depart(torch.autograd.Function):
    """Rows begin to travel. Backward, their gradient is waited for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        exchange.flight = exchange.group.launch(x, exchange.send, exchange.receive)
        return x.view_as(x)  # what `_Arrive` hangs on

    @staticmethod
    @once_differentiable
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange.land(), None


class _Arrive(torch.autograd.Function):
    """Rows are waited for. Backward, their gradient begins to travel; `_Depart` alone may look at what is returned."""

    @staticmethod
    def forward(ctx: Any, sent: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.land()

    @staticmethod
    @once_differentiable
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        exchange: Exchange = ctx.exchange
        assert exchange.flight is None, "its gradient is under way already"
        exchange.flight = exchange.group.launch(grad, exchange.receive, exchange.send)
        return exchange.flight.out, None


def _bytes_of(x: Tensor) -> bytes:
    return x.cpu().numpy().tobytes()


def is_of_exchange(error: BaseException) -> bool:
    """Tell whether an error comes from an exchange that a library makes by itself, as FSDP and DeepSpeed do."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "/gloo/" in str(error))


def reason_of(error: BaseException) -> str:
    """Return what the backend says is wrong, without its own source line and advice."""
    first = first_line(error).partition(" This is typically")[0]
    return re.sub(r"^\[\S*?:\d+\] ", "", first)
