"""Double of NCCL EP's Python interface (`nccl.ep` of nccl-extensions 0.1) over gloo: its high-throughput, flat calls.

It takes what the library's header says of shapes, dtypes and passes, and refuses the rest. Rows and weights may be
wider than bfloat16 and float32, for laws in float64: `doubled` says what the dispatcher sends then.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import IntEnum
from types import ModuleType
from typing import Any, ClassVar
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor as Values

from tests.doubles.late_stream import NAN_BYTE, LateStream
from trainer.moe.dispatch import nccl_ep
from trainer.moe.dispatch.nccl_ep import NcclEPDispatcher


@contextmanager
def doubled(*, rows: torch.dtype = torch.bfloat16, weights: torch.dtype = torch.float32) -> Iterator[None]:
    """Let this process import the double as `nccl.ep`, and the dispatcher send rows and weights of these dtypes."""
    names = ("nccl", "nccl.ep", "nccl.ep.interop", "nccl.ep.interop.torch")
    top, ep, interop, of_torch = modules = [ModuleType(name) for name in names]
    for parent, name, child in ((top, "ep", ep), (ep, "interop", interop), (interop, "torch", of_torch)):
        setattr(parent, name, child)
    of_torch.get_nccl_comm_from_group = lambda group: group  # type: ignore[attr-defined]
    for double in (
        Algorithm, CombineConfig, CombineInputs, CombineOutputs, DispatchConfig, DispatchInputs, DispatchOutputs,
        ExpertIdKind, Group, GroupConfig, Layout, LayoutInfo, PassDir, Tensor,
    ):  # fmt: skip
        setattr(ep, double.__name__, double)
    with (
        patch.dict(sys.modules, dict(zip(names, modules, strict=True))),
        patch.multiple(NcclEPDispatcher, row_dtype=rows, weight_dtype=weights),
        patch.object(nccl_ep, "exchange_stream", lambda device: LateStream()),
        patch.object(Group, "weights", weights),
    ):
        yield


class Algorithm(IntEnum):
    """Algorithms, of which this is one."""

    LOW_LATENCY = 0
    HIGH_THROUGHPUT = 1


class Layout(IntEnum):
    """Orders of what arrives, of which this is one."""

    UNSET = 0
    FLAT = 3


class PassDir(IntEnum):
    """Directions of a pass."""

    FWD = 0
    BWD = 1


class ExpertIdKind(IntEnum):
    """Numbers of the experts of what arrives."""

    AUTO = 0
    LOCAL = 1


class Tensor:
    """Descriptor of memory that lies in one piece."""

    def __init__(self, buffer: Values) -> None:
        assert buffer.is_contiguous(), "a descriptor has no strides"
        self.values = buffer


@dataclass(kw_only=True)
class GroupConfig:
    """Sizes of a group."""

    algorithm: Algorithm = Algorithm.LOW_LATENCY
    num_experts: int = 0
    max_dispatch_tokens_per_rank: int = 0
    max_recv_tokens_per_rank: int = 0
    max_token_bytes: int = 0
    num_topk: int = 0


@dataclass(kw_only=True)
class LayoutInfo:
    """Counts that a new routing writes."""

    expert_counters: Tensor
    recv_total_counter: Tensor
    recv_topk_idx_kind: ExpertIdKind = ExpertIdKind.AUTO


@dataclass(kw_only=True)
class DispatchInputs:
    """Tokens and weights."""

    tokens: Tensor
    topk_weights: Tensor | None = None


@dataclass(kw_only=True)
class DispatchOutputs:
    """Memory for tokens, weights and local experts."""

    tokens: Tensor
    topk_weights: Tensor | None = None
    topk_idx: Tensor | None = None


@dataclass(kw_only=True)
class CombineInputs:
    """Tokens and weights."""

    tokens: Tensor
    topk_weights: Tensor | None = None


@dataclass(kw_only=True)
class CombineOutputs:
    """Memory for sums of tokens and weights."""

    tokens: Tensor
    topk_weights: Tensor | None = None


@dataclass(kw_only=True)
class DispatchConfig:
    """Direction of a dispatch."""

    pass_direction: PassDir = PassDir.FWD


@dataclass(kw_only=True)
class CombineConfig:
    """Direction of a combine."""

    pass_direction: PassDir = PassDir.FWD


@dataclass
class Group:
    """Group of ranks for one size of tokens."""

    ranks: dist.ProcessGroup
    config: GroupConfig
    handles: list["Handle"] = field(default_factory=list)
    weights: ClassVar[torch.dtype] = torch.float32

    @classmethod
    def create(cls, comm: dist.ProcessGroup, config: GroupConfig) -> "Group":
        """Make a group."""
        assert config.algorithm is Algorithm.HIGH_THROUGHPUT and config.max_recv_tokens_per_rank == 0
        assert config.max_dispatch_tokens_per_rank > 0 and config.num_experts % comm.size() == 0
        assert config.max_token_bytes > 0 and config.max_token_bytes % 16 == 0, "a multiple of 16 bytes"
        group = cls(comm, config)
        assert all(other == config for other in group.gather(config)), "ranks made different groups"
        return group

    def create_handle(
        self, layout: Layout, topk_idx: Tensor, *, layout_info: LayoutInfo, config: Any = None, stream: int
    ) -> "Handle":
        """Route tokens by a new handle."""
        assert layout is Layout.FLAT and config is None
        handle = Handle(self)
        self.handles.append(handle)
        handle.update(topk_idx, layout_info=layout_info, stream=stream)
        return handle

    def gather(self, value: Any) -> list[Any]:
        """Return the value of every rank."""
        values: list[Any] = [None] * self.ranks.size()
        dist.all_gather_object(values, value, group=self.ranks)
        return values


class Handle:
    """A routing: for each rank the tokens that come from there."""

    def __init__(self, group: Group) -> None:
        self.group = group

    def update(self, topk_idx: Tensor, *, layout_info: LayoutInfo, stream: int) -> None:
        """Route tokens, and write how many arrive here."""
        group, index = self.group, topk_idx.values
        self.me, self.here = group.ranks.rank(), group.config.num_experts // group.ranks.size()
        assert index.dtype in (torch.int32, torch.int64) and (index < group.config.num_experts).all()
        assert len(index) <= group.config.max_dispatch_tokens_per_rank and index.shape[1] <= group.config.num_topk
        assert layout_info.recv_topk_idx_kind is ExpertIdKind.LOCAL, "AUTO may change"
        self.num_tokens, self.num_slots = index.shape
        self.local: list[Values] = []
        self.sources: list[Values] = []
        for theirs in group.gather(index):
            local = torch.where((theirs >= 0) & (theirs // self.here == self.me), theirs - self.me * self.here, -1)
            self.sources.append((local >= 0).any(1).nonzero()[:, 0])
            self.local.append(local[self.sources[-1]])
        self.everyone = group.gather(self.sources)
        arrived = torch.cat(self.local)
        total, experts = layout_info.recv_total_counter.values, layout_info.expert_counters.values
        assert total.shape == (1,) and experts.shape == (self.here,) and total.dtype is experts.dtype is torch.int32
        total.fill_(len(arrived))
        experts.copy_(torch.stack([(arrived == expert).sum() for expert in range(self.here)]))
        self.num_here = len(arrived)

    def dispatch(
        self, inputs: DispatchInputs, outputs: DispatchOutputs, *, config: DispatchConfig, stream: int
    ) -> None:
        """Send tokens; forward also weights and local experts."""
        x, is_forward = inputs.tokens.values, config.pass_direction is PassDir.FWD
        assert (inputs.topk_weights is not None) == is_forward, "forward passes have weights, and only they"
        assert (outputs.topk_weights is not None) == (outputs.topk_idx is not None) == is_forward
        self._fill(outputs.tokens, self._received(x, (self.num_tokens, x.shape[1])), x.dtype)
        if inputs.topk_weights is None or outputs.topk_weights is None or outputs.topk_idx is None:
            return
        weight = inputs.topk_weights.values
        assert weight.dtype is self.group.weights
        local = torch.cat(self.local)
        received = self._received(weight, (self.num_tokens, self.num_slots)) * (local >= 0)
        self._fill(outputs.topk_weights, received, weight.dtype)
        self._fill(outputs.topk_idx, local, outputs.topk_idx.values.dtype)

    def combine(self, inputs: CombineInputs, outputs: CombineOutputs, *, config: CombineConfig, stream: int) -> None:
        """Sum tokens; backward also weights."""
        is_backward = config.pass_direction is PassDir.BWD
        assert (inputs.topk_weights is not None) == (outputs.topk_weights is not None) == is_backward
        x = inputs.tokens.values
        self._fill(outputs.tokens, self._summed(x), x.dtype)
        if inputs.topk_weights is not None and outputs.topk_weights is not None:
            weight = inputs.topk_weights.values
            assert weight.dtype is self.group.weights and weight.shape[1] == self.num_slots
            self._fill(outputs.topk_weights, self._summed(weight), weight.dtype)

    def _received(self, x: Values, shape: tuple[int, int]) -> Values:
        assert x.shape == shape, f"{x.shape}, and the routing is of {shape}"
        if x.dtype is not self.group.weights:
            assert x.shape[1] * x.element_size() <= self.group.config.max_token_bytes
        rows = self.group.gather(x)
        return torch.cat([theirs[own] for theirs, own in zip(rows, self.sources, strict=True)])

    def _summed(self, x: Values) -> Values:
        assert len(x) == self.num_here, f"{len(x)} tokens, and {self.num_here} were dispatched"
        total = x.new_zeros(self.num_tokens, x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))
        for theirs, sources in zip(self.group.gather(x), self.everyone, strict=True):
            sizes = [len(own) for own in sources]
            total.index_add_(0, sources[self.me], theirs.split(sizes)[self.me].to(total.dtype))
        return total

    @staticmethod
    def _fill(output: Tensor, values: Values, dtype: torch.dtype) -> None:
        assert output.values.shape == values.shape and output.values.dtype is dtype
        output.values.view(torch.uint8).fill_(NAN_BYTE)
        output.values.copy_(values)
