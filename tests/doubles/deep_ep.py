"""Double of DeepEP 2.1's `ElasticBuffer` over gloo: the same calls, and a refusal of what its kernels assert against.

Received tensors are NaN until their event was awaited, so that reading too early shows. Rows and weights may be wider
than the library's bfloat16 and float32, for laws in float64: `doubled` says what the dispatcher sends then.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.moe.dispatch.deepep import DeepEPDispatcher


@contextmanager
def doubled(*, rows: torch.dtype = torch.bfloat16, weights: torch.dtype = torch.float32) -> Iterator[None]:
    """Let this process import the double as `deep_ep`, and the dispatcher send rows and weights of these dtypes."""
    module = ModuleType("deep_ep")
    module.ElasticBuffer = ElasticBuffer  # type: ignore[attr-defined]
    own = DeepEPDispatcher.row_dtype, DeepEPDispatcher.weight_dtype
    with patch.dict(sys.modules, {"deep_ep": module}):
        ElasticBuffer.rows, ElasticBuffer.weights = rows, weights
        DeepEPDispatcher.row_dtype, DeepEPDispatcher.weight_dtype = rows, weights
        try:
            yield
        finally:
            DeepEPDispatcher.row_dtype, DeepEPDispatcher.weight_dtype = own


class EventOverlap:
    """Event of a kernel: its results are there once it was awaited."""

    def __init__(self, results: list[tuple[Tensor, Tensor]]) -> None:
        self._results = results

    def current_stream_wait(self) -> None:
        """Let the results arrive."""
        assert self._results, "the event was awaited before"
        for buffer, values in self._results:
            buffer.copy_(values)
        self._results = []


class EPHandle:
    """What a dispatch leaves for its combine."""

    def __init__(self, buffer: "ElasticBuffer", topk_idx: Tensor, num_experts: int, sources: list[Tensor]) -> None:
        self.buffer, self.topk_idx, self.num_experts, self.sources = buffer, topk_idx, num_experts, sources
        self.num_sms = 4
        self.num_recv_tokens = sum(map(len, sources))
        self.num_recv_tokens_per_expert_list: list[int] = []


class ElasticBuffer:
    """Buffer of a group for tokens of one width."""

    rows, weights = torch.bfloat16, torch.float32

    def __init__(
        self,
        group: dist.ProcessGroup,
        *,
        num_max_tokens_per_rank: int = 0,
        hidden: int = 0,
        num_topk: int = 0,
        deterministic: bool = False,
    ) -> None:
        assert num_max_tokens_per_rank > 0 and hidden > 0
        self.group, self.most, self.hidden = group, num_max_tokens_per_rank, hidden
        sizes = self._gather((num_max_tokens_per_rank, hidden, num_topk, deterministic))
        assert len(set(sizes)) == 1, "ranks made different buffers"

    def dispatch(
        self,
        x: Tensor,
        *,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        num_experts: int | None = None,
        num_sms: int = 0,
        handle: EPHandle | None = None,
        async_with_compute_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, EPHandle, EventOverlap]:
        """Send tokens to the ranks of their experts, or those of a handle again."""
        assert async_with_compute_stream, "without it there is no event"
        assert num_sms > 0 or num_experts is not None, "the number of SMs is computed from that of experts"
        self._check_rows(x)
        assert len(x) <= self.most, f"{len(x)} tokens, and the buffer has room for {self.most}"
        if handle is not None:
            assert topk_idx is None and topk_weights is None, "a handle has them"
            assert handle.buffer is self and len(x) == len(handle.topk_idx)
            received = torch.cat([rows[own] for rows, own in zip(self._gather(x), handle.sources, strict=True)])
            (there,), event = _arriving(received)
            return there, None, None, handle, event
        assert topk_idx is not None and topk_weights is not None and num_experts is not None
        size, me = self.group.size(), self.group.rank()
        assert num_experts % size == 0, "experts are shared evenly"
        for tensor in (topk_idx, topk_weights):
            assert tensor.is_contiguous() and len(tensor) == len(x) and tensor.shape == topk_idx.shape
        assert topk_idx.dtype is torch.int64 and ((topk_idx >= -1) & (topk_idx < num_experts)).all()
        assert topk_weights.dtype is self.weights
        here = num_experts // size
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        sources = []
        for rows, index, weight in self._gather((x, topk_idx, topk_weights)):
            is_mine = (index >= 0) & (index // here == me)
            own = is_mine.any(1).nonzero()[:, 0]
            sources.append(own)
            parts.append((rows[own], torch.where(is_mine, index - me * here, -1)[own], (weight * is_mine)[own]))
        got_x, got_index, got_weight = (torch.cat(values) for values in zip(*parts, strict=True))
        new = EPHandle(self, topk_idx.clone(), num_experts, sources)
        new.num_recv_tokens_per_expert_list = [int((got_index == e).sum()) for e in range(here)]
        (x_there, weight_there), event = _arriving(got_x, got_weight)
        return x_there, got_index, weight_there, new, event

    def combine(
        self,
        x: Tensor,
        handle: EPHandle,
        *,
        topk_weights: Tensor | None = None,
        async_with_compute_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, EventOverlap]:
        """Sum tokens, and weights, over the ranks that they were sent to."""
        assert async_with_compute_stream and handle.buffer is self
        self._check_rows(x)
        assert len(x) == handle.num_recv_tokens, f"{len(x)} tokens, and {handle.num_recv_tokens} were dispatched"
        num_tokens, me = len(handle.topk_idx), self.group.rank()
        if topk_weights is not None:
            assert topk_weights.is_contiguous() and topk_weights.dtype is self.weights
            assert topk_weights.shape == (len(x), handle.topk_idx.shape[1])
        total = x.new_zeros(num_tokens, self.hidden, dtype=torch.promote_types(x.dtype, torch.float32))
        weights = torch.zeros(handle.topk_idx.shape, dtype=self.weights)
        for rows, of_rows, sources in self._gather((x, topk_weights, handle.sources)):
            sizes = [len(own) for own in sources]
            total.index_add_(0, sources[me], rows.split(sizes)[me].to(total.dtype))
            if of_rows is not None:
                weights.index_add_(0, sources[me], of_rows.split(sizes)[me])
        (total_here, weights_here), event = _arriving(total.to(x.dtype), weights)
        return total_here, None if topk_weights is None else weights_here, event

    def _check_rows(self, x: Tensor) -> None:
        assert x.dtype is self.rows and x.is_contiguous() and x.shape[1] == self.hidden
        assert x.shape[1] * x.element_size() % 16 == 0, "rows are multiples of 16 bytes"

    def _gather(self, value: Any) -> list[Any]:
        """Return the value of every rank of the group."""
        values: list[Any] = [None] * self.group.size()
        dist.all_gather_object(values, value, group=self.group)
        return values


def _arriving(*values: Tensor) -> tuple[list[Tensor], EventOverlap]:
    """Return buffers of NaN for values, and the event that fills them."""
    buffers = [torch.full_like(value, torch.nan) for value in values]
    return buffers, EventOverlap(list(zip(buffers, values, strict=True)))
