"""Tokens by DeepEP, which sends them between GPUs over NVLink and RDMA (`deep_ep.ElasticBuffer`, V2)."""

from typing import Any

import torch
from torch import Tensor

from trainer.distributed.exchange import Arriving
from trainer.moe.dispatch.library_exchange import KEY, starting
from trainer.moe.dispatch.token_library import BufferSize, SentTokens, TokenBuffer, TokenLibraryDispatcher
from trainer.packages import importing


class DeepEPDispatcher(TokenLibraryDispatcher):
    """Sends each token once to each rank that has any of its experts, by DeepEP's kernels."""

    kind = "deepep"

    def new_buffer(self, size: BufferSize) -> TokenBuffer:
        """Make a buffer. Collective.

        Raises:
            ConfigError: if the package, or what it needs of the machine, is missing.
        """
        with starting("DeepEP"):
            with importing("deep_ep", user=f"{KEY}: deepep"):
                # pyrefly: ignore[missing-import]
                import deep_ep
            buffer = deep_ep.ElasticBuffer(
                self.group.handle,
                num_max_tokens_per_rank=size.tokens_per_rank,
                hidden=size.width,
                num_topk=size.num_slots,
                deterministic=torch.are_deterministic_algorithms_enabled(),
            )
            return _ElasticTokenBuffer(buffer, size.num_experts)


class _ElasticTokenBuffer(TokenBuffer):
    """DeepEP's buffer; a routing is what it calls a handle."""

    def __init__(self, buffer: Any, num_experts: int) -> None:
        self._buffer, self._num_experts = buffer, num_experts

    def dispatch(self, x: Tensor, expert: Tensor, weight: Tensor) -> SentTokens:
        """Start to send tokens."""
        here, local_expert, weight_here, handle, event = self._buffer.dispatch(
            x,
            topk_idx=expert,
            topk_weights=weight,
            num_experts=self._num_experts,
            async_with_compute_stream=True,
        )
        return SentTokens(
            routing=handle,
            arriving=Arriving((here, weight_here), event.current_stream_wait),
            local_expert=local_expert,
            num_rows=sum(handle.num_recv_tokens_per_expert_list),
        )

    def dispatch_again(self, routing: Any, x: Tensor) -> Arriving:
        """Start to send tokens where others went."""
        # The number of SMs that it would choose by itself needs what only a first dispatch is given.
        there, _, _, _, event = self._buffer.dispatch(
            x, handle=routing, num_sms=routing.num_sms, async_with_compute_stream=True
        )
        return Arriving((there,), event.current_stream_wait)

    def combine(self, routing: Any, x: Tensor) -> Arriving:
        """Start to sum tokens."""
        total, _, event = self._buffer.combine(x, handle=routing, async_with_compute_stream=True)
        return Arriving((total,), event.current_stream_wait)

    def combine_weighted(self, routing: Any, x: Tensor, weight: Tensor) -> Arriving:
        """Start to sum tokens and weights."""
        total, of_weight, event = self._buffer.combine(
            x, handle=routing, topk_weights=weight, async_with_compute_stream=True
        )
        return Arriving((total, of_weight), event.current_stream_wait)
