"""Every collective there is: the only module that calls torch.distributed to exchange anything.

A group of one rank exchanges nothing and needs no process group, so that one process runs the same code as many.
All sums are SUM: nothing is ever averaged here, and nobody else divides by a number of ranks.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from trainer.distributed.journal import Journal
from trainer.distributed.watch import Watch
from trainer.errors import CommError


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
    def of_one(cls) -> "Group":
        """Return a group with nobody else in it."""
        return cls("world", [0], me=0, handle=None, journal=Journal())

    @property
    def device(self) -> torch.device:
        """Where tensors must be to be exchanged."""
        is_nccl = self._handle is not None and dist.get_backend(self._handle) == "nccl"
        return torch.device("cuda", torch.cuda.current_device()) if is_nccl else torch.device("cpu")

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.ranks)

    def device_mesh(self) -> DeviceMesh:
        """Return the same ranks in the form that torch's FSDP takes."""
        assert self._handle is not None, "nobody to share with"
        return DeviceMesh.from_group(self._handle, self.device.type)

    def sum_(self, x: Tensor) -> Tensor:
        """Add up x over the ranks, in place; every rank gets bitwise the same."""
        if self._handle is not None:
            with self._watched("sum", [x.numel()]):
                dist.all_reduce(x, group=self._handle)
        return x

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

    def gather_objects(self, value: Any) -> list[Any]:
        """Return everybody's value, pickled on the way: for small things between trusted ranks."""
        if self._handle is None:
            return [value]
        values: list[Any] = [None] * self.size
        with self._watched("gather_objects", []):
            dist.all_gather_object(values, value, group=self._handle)
        return values

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
        assert sum(send) == len(x), f"{sum(send)} rows to send, {len(x)} rows there"
        return _Exchange.apply(x, self, tuple(send), tuple(receive)) if self._handle is not None else x

    def exchange_plain(self, x: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        """Do what `exchange` does, outside autograd."""
        out = x.new_empty(sum(receive), *x.shape[1:])
        with self._watched("exchange", send):
            dist.all_to_all_single(out, x.contiguous(), list(receive), list(send), group=self._handle)
        return out

    @contextmanager
    def _watched(self, name: str, sizes: Sequence[int]) -> Iterator[None]:
        operation = self.journal.begin(name, self.name, sizes)
        try:
            yield
        except RuntimeError as error:  # stays the running one: this is where the rank gave up
            raise CommError(
                f"rank {self.ranks[self.index]}: {operation} failed at step {self.journal.step}: {_reason(error)}"
            ) from error
        self.journal.end()


def is_of_exchange(error: BaseException) -> bool:
    """Tell whether an error comes from an exchange that torch itself makes, as FSDP does."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "/gloo/" in str(error))


def _reason(error: RuntimeError) -> str:
    """Return what the backend says is wrong, without its own source line and advice."""
    first = str(error).splitlines()[0].partition(" This is typically")[0]
    return re.sub(r"^\[\S*?:\d+\] ", "", first)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, send: tuple[int, ...], receive: tuple[int, ...]) -> Tensor:
        ctx.group, ctx.send, ctx.receive = group, send, receive
        return group.exchange_plain(x, send, receive)

    @staticmethod
    # pyrefly: ignore[bad-override]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.group.exchange_plain(grad, ctx.receive, ctx.send), None, None, None
