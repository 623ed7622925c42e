"""Count what a rank sends: messages and bytes of every collective, forward and backward."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass(slots=True)
class Sent:
    """Messages and bytes that one rank has sent to others."""

    row_bytes: int = 0
    """By all-to-alls and all-gathers of floating-point rows of the width of a token."""
    other_bytes: int = 0
    """By all other collectives."""
    messages: int = 0
    """To one other rank each."""
    collectives: dict[str, int] = field(default_factory=dict)
    """Number of each."""

    def facts(self, tokens: int) -> dict[str, float]:
        """Return the bytes by token, and the numbers of messages and collectives."""
        return {
            "row_bytes_per_token": self.row_bytes / tokens,
            "other_bytes_per_token": self.other_bytes / tokens,
            "messages": self.messages,
            "collectives": sum(self.collectives.values()),
        }

    def add(self, size: int, *, are_rows: bool) -> None:
        """Add bytes."""
        if are_rows:
            self.row_bytes += size
        else:
            self.other_bytes += size


class MessageCounter(TorchDispatchMode):
    """Counts the collectives of this thread inside its context, as torch.distributed hands them to its backend.

    A rank sends nothing to itself. An all-gather sends a rank's tensor to each other member, an all-reduce of n ranks
    2 (n - 1) / n of its tensor and a reduce-scatter half of that, as a ring does.
    """

    def __init__(self, width: int) -> None:
        """Start to count; `width` is that of a token: D."""
        super().__init__()
        self.sent, self.width = Sent(), width

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count the operation if it communicates, and run it."""
        call = call_of(func, args)
        if call is not None:
            sent = self.sent
            sent.collectives[call.name] = sent.collectives.get(call.name, 0) + 1
            sent.messages += call.messages
            may_be_rows = call.name.startswith(("alltoall", "allgather"))
            sent.add(call.bytes_sent, are_rows=may_be_rows and call.width == self.width)
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectiveCall:
    """One collective of a rank."""

    name: str
    """Torch's name, such as `allreduce`."""
    ranks: tuple[int, ...]
    """Global ranks of its group; of what one rank sends to another, both."""
    bytes_sent: int
    """By this rank to others."""
    messages: int
    width: int | None
    """Last dimension of floating-point rows; None: they are none."""


def call_of(func: Any, args: Sequence[Any]) -> CollectiveCall | None:
    """Return the collective that an operation is; None if it sends nothing."""
    name = func.name() if hasattr(func, "name") else ""
    if not name.startswith("c10d::"):
        return None
    name = name.removeprefix("c10d::").strip("_")
    handle = next((arg for arg in args if isinstance(arg, torch.ScriptObject)), None)
    group = None if handle is None else dist.ProcessGroup.unbox(handle)
    if group is None or group.size() == 1 or name.startswith(("barrier", "recv")):
        return None
    ranks = tuple(dist.get_process_group_ranks(group))
    others = group.size() - 1
    if name.startswith("alltoall_base"):
        x = args[1]
        there = [rows * _row_bytes(x) for rows in args[4] or [len(x) // group.size()] * group.size()]
        there[group.rank()] = 0
        size, messages = sum(there), sum(size > 0 for size in there)
    else:
        tensors = _flat(args[1] if name.startswith(("allgather", "reduce_scatter")) else args[0])
        size, messages, x = sum(tensor.numel() * tensor.element_size() for tensor in tensors), others, tensors[0]
        if name == "send":
            messages, ranks = 1, (ranks[group.rank()], ranks[args[2]])
        elif name.startswith("allreduce"):
            size = 2 * size * others // group.size()
        elif name.startswith("reduce_scatter"):
            size = size * others // group.size()
        else:
            size *= others
    width = x.shape[-1] if x.is_floating_point() and x.dim() > 1 else None
    return CollectiveCall(name=name, ranks=ranks, bytes_sent=size, messages=messages, width=width)


def _row_bytes(x: Tensor) -> int:
    return x.element_size() * math.prod(x.shape[1:])


def _flat(value: Any) -> list[Tensor]:
    """Return the tensors of nested lists."""
    if isinstance(value, Tensor):
        return [value]
    return [tensor for part in value for tensor in _flat(part)] if isinstance(value, (list, tuple)) else []
