"""Dispatch and combine by DeepEP, which sends tokens between GPUs over NVLink and RDMA (`deep_ep.ElasticBuffer`, V2).

Each token goes once to each rank that has any of its experts, with the local expert and the combine weight of each
slot, and one sum comes back from each, as with `deduplicated_all_to_all`. The gradient of a dispatch is a combine with
its handle, and that of a combine a dispatch with it. Rows travel in bfloat16, and weights in float32.
"""

from typing import Any

import torch
from torch import Tensor

from trainer.distributed.collectives import Group
from trainer.distributed.exchange import Arriving, UnderWay
from trainer.errors import ConfigError
from trainer.moe.dispatch.base import Dispatched, RunExperts
from trainer.moe.dispatch.exchanging import ExchangingDispatcher
from trainer.moe.dispatch.library_exchange import KEY, LibraryExchange, starting
from trainer.moe.dispatch.token_slots import TokenSlots
from trainer.moe.routing import RoutingDecision
from trainer.packages import importing

# T tokens, k slots, N copies of tokens that arrive, E experts, D d_model.


class DeepEPDispatcher(ExchangingDispatcher):
    """Sends each token once to each rank that has any of its experts, by DeepEP's kernels."""

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
                f"{KEY}: deepep needs equally many experts on all ranks, and {num_experts} over ep_size {group.size} "
                "are not; use another ep_size, or all_to_all"
            )
        self.num_experts, self.tokens_per_rank = num_experts, tokens_per_rank

    def begin(self, x: Tensor, decision: RoutingDecision) -> UnderWay:
        """Start to send the tokens x (T, D) to the ranks of their experts."""
        if decision.top_k is None:
            raise ConfigError(f"{KEY}: deepep needs a fixed number of experts per token; use all_to_all")
        if len(x) > self.tokens_per_rank:
            raise ConfigError(
                f"{KEY}.tokens_per_rank: {self.tokens_per_rank}, and a pass has {len(x)} tokens; raise it, the same "
                "on all ranks, or lower parallel.micro_batch_size"
            )
        with self.step_timer.within("dispatch"):
            slots = TokenSlots.of(decision)
            expert = torch.where(slots.expert_index < self.num_experts, slots.expert_index, -1)  # -1 for none
            buffer = self._buffer(x.shape[1], expert.shape[1])
            exchange = _Dispatch(self.group, buffer, expert, self.num_experts)
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

    def _buffer(self, width: int, num_slots: int) -> Any:
        """Return the group's buffer for tokens of a width, made at its first use. Collective then."""
        key = "deepep", width, num_slots, self.tokens_per_rank
        if key not in self.group.buffers:
            self.group.buffers[key] = _new_buffer(self.group, width, num_slots, self.tokens_per_rank)
        return self.group.buffers[key]


def _new_buffer(group: Group, width: int, num_slots: int, tokens_per_rank: int) -> Any:
    """Make a buffer.

    Raises:
        ConfigError: if the package, or what it needs of the machine, is missing.
    """
    with starting("DeepEP"):
        with importing("deep_ep", user=f"{KEY}: deepep"):
            # pyrefly: ignore[missing-import]
            import deep_ep
        return deep_ep.ElasticBuffer(
            group.handle,
            num_max_tokens_per_rank=tokens_per_rank,
            hidden=width,
            num_topk=num_slots,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )


class _Dispatch(LibraryExchange):
    """Tokens and combine weights to the ranks of their experts."""

    def __init__(self, group: Group, buffer: Any, expert: Tensor, num_experts: int) -> None:
        super().__init__(group, "deepep dispatch")
        self.buffer, self._expert, self._num_experts = buffer, expert, num_experts
        self.handle: Any = None
        """Handle by which the library sends the same rows again, or back."""
        self.local_expert: Tensor = expert
        """(N, k) local expert of each slot that arrives; -1 for none."""
        self.num_rows = 0
        """Slots that arrive with an expert of this rank."""

    def send(self, *tensors: Tensor) -> Arriving:
        """Start to send tokens (T, D) and weights (T, k)."""
        x, weight = tensors
        here, self.local_expert, weight_here, self.handle, event = self.buffer.dispatch(
            x,
            topk_idx=self._expert.contiguous(),
            topk_weights=weight,
            num_experts=self._num_experts,
            async_with_compute_stream=True,
        )
        self.num_rows = sum(self.handle.num_recv_tokens_per_expert_list)
        return Arriving((here, weight_here), event.current_stream_wait)

    def send_back(self, *gradients: Tensor) -> Arriving:
        """Start to sum gradients of tokens (N, D) and weights (N, k) over ranks."""
        x, weight = gradients
        total, of_weight, event = self.buffer.combine(
            x, handle=self.handle, topk_weights=weight, async_with_compute_stream=True
        )
        return Arriving((total, of_weight), event.current_stream_wait)


class _Combine(LibraryExchange):
    """Sums of tokens back to their ranks."""

    def __init__(self, dispatch: _Dispatch) -> None:
        super().__init__(dispatch.group, "deepep combine")
        self._buffer, self._handle = dispatch.buffer, dispatch.handle

    def send(self, *tensors: Tensor) -> Arriving:
        """Start to sum outputs (N, D) over ranks."""
        total, _, event = self._buffer.combine(tensors[0], handle=self._handle, async_with_compute_stream=True)
        return Arriving((total,), event.current_stream_wait)

    def send_back(self, *gradients: Tensor) -> Arriving:
        """Start to send the gradient (T, D) to all ranks that the tokens went to."""
        # The number of SMs that it would choose by itself needs what only a first dispatch is given.
        x, _, _, _, event = self._buffer.dispatch(
            gradients[0], handle=self._handle, num_sms=self._handle.num_sms, async_with_compute_stream=True
        )
        return Arriving((x,), event.current_stream_wait)
