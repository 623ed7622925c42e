"""Dispatch and combine of tokens by a library that sends each one once to each rank that has any of its experts.

With a token travel the local expert and the combine weight of each slot, and one sum comes back from each rank, as with
`deduplicated_all_to_all`. The gradient of a dispatch is a combine with its routing, and that of a combine a dispatch
with it. Rows travel in bfloat16, and weights in float32.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from trainer.distributed.collectives import Group
from trainer.distributed.exchange import Arriving, UnderWay
from trainer.errors import ConfigError
from trainer.moe.dispatch.base import Dispatched, RunExperts
from trainer.moe.dispatch.exchanging import ExchangingDispatcher
from trainer.moe.dispatch.library_exchange import KEY, LibraryExchange
from trainer.moe.dispatch.token_slots import TokenSlots
from trainer.moe.routing import RoutingDecision

# T tokens, k slots, N copies of tokens that arrive, E experts, D d_model.


@dataclass(frozen=True, slots=True, kw_only=True)
class BufferSize:
    """Sizes for which a library allocates memory of a group."""

    num_experts: int
    """Experts of all ranks."""
    tokens_per_rank: int
    """Most tokens that a rank sends in one pass; the same on all ranks."""
    width: int
    num_slots: int
    dtype: torch.dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class SentTokens:
    """Tokens under way by a new routing."""

    routing: Any
    """By which the library sends such tokens again, or back."""
    arriving: Arriving
    """Tokens (N, D) and weights (N, k)."""
    local_expert: Tensor
    """(N, k) local expert of each slot that arrives, once it has; -1 for none."""
    num_rows: int
    """Slots that arrive with an expert of this rank."""


class TokenBuffer(ABC):
    """A library's memory for a group, and its calls."""

    @abstractmethod
    def dispatch(self, x: Tensor, expert: Tensor, weight: Tensor) -> SentTokens:
        """Start to send tokens (T, D), experts (T, k), -1 for none, and weights (T, k)."""

    @abstractmethod
    def dispatch_again(self, routing: Any, x: Tensor) -> Arriving:
        """Start to send tokens (T, D) where others went."""

    @abstractmethod
    def combine(self, routing: Any, x: Tensor) -> Arriving:
        """Start to sum tokens (N, D) over the ranks that they went to: (T, D)."""

    @abstractmethod
    def combine_weighted(self, routing: Any, x: Tensor, weight: Tensor) -> Arriving:
        """Start to sum tokens (N, D) and weights (N, k) over ranks: (T, D), (T, k)."""


class TokenLibraryDispatcher(ExchangingDispatcher, ABC):
    """Sends each token once to each rank that has any of its experts, by a library."""

    kind: ClassVar[str]
    row_dtype: torch.dtype = torch.bfloat16
    """Dtype of rows: the only one that the library sums."""
    weight_dtype: torch.dtype = torch.float32

    def __init__(self, group: Group, num_experts: int, tokens_per_rank: int) -> None:
        """Create the dispatcher.

        Args:
            group: of ranks with equally many experts each.
            num_experts: of all ranks.
            tokens_per_rank: most tokens that a rank sends in one pass; the same on all ranks.
        """
        super().__init__(group, num_experts)
        if num_experts % group.size:
            raise ConfigError(
                f"{KEY}: {self.kind} needs equally many experts on all ranks, and {num_experts} over ep_size "
                f"{group.size} are not; use another ep_size, or all_to_all"
            )
        self.num_experts, self.tokens_per_rank = num_experts, tokens_per_rank

    @abstractmethod
    def new_buffer(self, size: BufferSize) -> TokenBuffer:
        """Make a buffer. Collective.

        Raises:
            ConfigError: if the package, or what it needs of the machine, is missing.
        """

    def begin(self, x: Tensor, decision: RoutingDecision) -> UnderWay:
        """Start to send the tokens x (T, D) to the ranks of their experts."""
        if decision.top_k is None:
            raise ConfigError(f"{KEY}: {self.kind} needs a fixed number of experts per token; use all_to_all")
        if len(x) > self.tokens_per_rank:
            raise ConfigError(
                f"{KEY}.tokens_per_rank: {self.tokens_per_rank}, and a pass has {len(x)} tokens; raise it, the same "
                "on all ranks, or lower parallel.micro_batch_size"
            )
        with self.step_timer.within("dispatch"):
            slots = TokenSlots.of(decision)
            expert = torch.where(slots.expert_index < self.num_experts, slots.expert_index, -1)  # -1 for none
            exchange = _Dispatch(self.group, self._buffer(x.shape[1], expert.shape[1]), expert, self.kind)
            return UnderWay.start(exchange, x.to(self.row_dtype), slots.weight.to(self.weight_dtype))

    def compute(self, begun: UnderWay, experts: RunExperts) -> UnderWay:
        """Apply the experts, and start to send each token's sum back."""
        dispatch = begun.exchange
        assert isinstance(dispatch, _Dispatch)
        with self.step_timer.within("dispatch"):
            x, weight = begun.wait()
            expert, num_here = dispatch.local_expert, self.num_experts // self.group.size
            expert_index = torch.where(expert < 0, num_here, expert).long()
            sent = Dispatched(x=x, expert_index=expert_index, weight=weight, num_rows=dispatch.num_rows)
        y = self.apply(sent, experts)
        with self.step_timer.within("combine"):
            return UnderWay.start(_Combine(dispatch), y.to(self.row_dtype))

    def finish(self, computed: UnderWay) -> Tensor:
        """Wait for each token's sum over ranks."""
        with self.step_timer.within("combine"):
            (y,) = computed.wait()
            return y.to(torch.promote_types(self.row_dtype, self.weight_dtype))

    def _buffer(self, width: int, num_slots: int) -> TokenBuffer:
        """Return the group's buffer for tokens of a width, made at its first use. Collective then."""
        size = BufferSize(
            num_experts=self.num_experts,
            tokens_per_rank=self.tokens_per_rank,
            width=width,
            num_slots=num_slots,
            dtype=self.row_dtype,
        )
        if (self.kind, size) not in self.group.buffers:
            self.group.buffers[self.kind, size] = self.new_buffer(size)
        return self.group.buffers[self.kind, size]


class _Dispatch(LibraryExchange):
    """Tokens and combine weights to the ranks of their experts."""

    def __init__(self, group: Group, buffer: TokenBuffer, expert: Tensor, kind: str) -> None:
        super().__init__(group, f"{kind} dispatch")
        self.buffer, self.kind, self._expert = buffer, kind, expert
        self.routing: Any = None
        self.local_expert, self.num_rows = expert, 0
        """As in `SentTokens`, whose tokens it does not keep: they keep this."""

    def send(self, *tensors: Tensor) -> Arriving:
        """Start to send tokens (T, D) and weights (T, k)."""
        x, weight = tensors
        routed = self.buffer.dispatch(x, self._expert.contiguous(), weight)
        self.routing, self.local_expert, self.num_rows = routed.routing, routed.local_expert, routed.num_rows
        return routed.arriving

    def send_back(self, *gradients: Tensor) -> Arriving:
        """Start to sum gradients of tokens (N, D) and weights (N, k) over ranks."""
        return self.buffer.combine_weighted(self.routing, *gradients)


class _Combine(LibraryExchange):
    """Sums of tokens back to their ranks."""

    def __init__(self, dispatch: _Dispatch) -> None:
        super().__init__(dispatch.group, f"{dispatch.kind} combine")
        self._dispatch = dispatch  # whose routing lives as long

    def send(self, *tensors: Tensor) -> Arriving:
        """Start to sum outputs (N, D) over ranks."""
        return self._dispatch.buffer.combine(self._dispatch.routing, tensors[0])

    def send_back(self, *gradients: Tensor) -> Arriving:
        """Start to send the gradient (T, D) to all ranks that the tokens went to."""
        return self._dispatch.buffer.dispatch_again(self._dispatch.routing, gradients[0])
