"""List what a step computes and sends: collectives, floating-point operations, and bytes read and written."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from trainer.lab.costs.message_counter import CollectiveCall, call_of
from trainer.lab.costs.plain_tensor_mode import PlainTensorMode
from trainer.ops.fused_ffn import has_onednn_product


@dataclass(slots=True)
class Work:
    """Work of the operations of one kind."""

    number: int = 0
    flops: int = 0
    bytes_moved: int = 0
    """Read and written, if every operation reads and writes its tensors once."""


@dataclass(frozen=True, slots=True)
class Kind:
    """Kind of operations that a device computes at the same speed."""

    is_product: bool
    dtype: torch.dtype


class StepOperations(PlainTensorMode):
    """Counts the operations inside the context; views are free."""

    def __init__(self) -> None:
        super().__init__()
        self.collectives: Counter[CollectiveCall] = Counter()
        self.work: dict[Kind, Work] = {}
        self.shard_calls = 0
        """Gathers and reductions of a group of sharded weights by FSDP2, which has work for the host around each."""

    def operation(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operation and count it."""
        call = call_of(func, args)
        out = func(*args, **kwargs)
        if call is not None:
            self.collectives[call] += 1
            return out
        self.shard_calls += func.name() in _OF_SHARDS
        if func.namespace != "c10d" and not func.is_view and "empty" not in func.name():
            self._count(func, args, kwargs, out)
        return out

    def _count(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        packet = func.overloadpacket
        if packet in _FLOPS:
            flops = _FLOPS[packet](*args, **kwargs)
        else:
            flops = flop_registry[packet](*args, **kwargs, out_val=out) if packet in flop_registry else 0
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
        if not tensors:
            return
        widest = max(tensors, key=lambda x: x.numel())
        dtype = widest.dtype if flops == 0 else next(x.dtype for x in tensors)
        work = self.work.setdefault(Kind(flops > 0, dtype), Work())
        work.number += 1
        work.flops += flops
        if packet in _READ_PARTS:  # as much as they write
            tensors = [*tree_leaves(out), *args[2:]]
            work.bytes_moved += _bytes(tree_leaves(out))
        work.bytes_moved += _bytes(tensors)

    @property
    def bytes_sent(self) -> int:
        """Bytes that this rank sends to others."""
        return sum(call.bytes_sent * number for call, number in self.collectives.items())

    @property
    def messages(self) -> int:
        """Messages, to one other rank each."""
        return sum(call.messages * number for call, number in self.collectives.items())

    @property
    def flops(self) -> int:
        """Floating-point operations of matrix products."""
        return sum(work.flops for work in self.work.values())


_OF_SHARDS = ("fsdp::all_gather_copy_in", "fsdp::chunk_cat")
"""One for each gather, and one for each reduction."""
_READ_PARTS = {torch.ops.aten.embedding, torch.ops.aten.index_select, torch.ops.aten.gather, torch.ops.aten.index}


def _bytes(values: Iterable[Any]) -> int:
    """Return the bytes of the tensors among values, each once."""
    return sum(x.numel() * x.element_size() for x in {id(x): x for x in values if isinstance(x, Tensor)}.values())


def _of_grouped(left: Tensor, right: Tensor, *_: Any, **__: Any) -> int:
    """Return the operations of a grouped product: each row, or pair of rows, is in one group."""
    return 2 * left.shape[0] * left.shape[1] * right.shape[-1]


def _of_attention(query: Tensor, key: Tensor, value: Tensor, drop: float = 0.0, causal: bool = False, **_: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape) // (2 if causal else 1)


def _of_attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    norm: Tensor,
    drop: float,
    causal: bool,
    **_: Any,
) -> int:
    return sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape) // (2 if causal else 1)


def _of_linear(x: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    return 2 * x.numel() * weight.shape[0]


_FLOPS: dict[Any, Callable[..., int]] = {
    torch.ops.aten._grouped_mm: _of_grouped,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _of_attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _of_attention_backward,
}
"""Operations that torch's registry lacks; of causal attention half the scores are computed."""
if has_onednn_product():
    _FLOPS[torch.ops.mkldnn._linear_pointwise] = _of_linear
