"""All-to-all that sends a token once to each rank that has any of its experts."""

from typing import NamedTuple

import torch
from torch import Tensor

from trainer.distributed.collectives import AllToAll
from trainer.moe.dispatch.base import Dispatched, RunExperts
from trainer.moe.dispatch.exchanging import ExchangingDispatcher
from trainer.moe.dispatch.token_slots import TokenSlots
from trainer.moe.routing import RoutingDecision
from trainer.ops.compute_dtype import compute_dtype
from trainer.ops.expert_order import ExpertOrder, count_slots, order_by_expert
from trainer.ops.permute import gather_rows, sum_rows

# T tokens, k slots, N copies of tokens that arrive, E experts, G ranks of the expert-parallel group, D d_model.


class DeduplicatedDispatcher(ExchangingDispatcher):
    """Sends tokens instead of assignments: with the expert and the combine weight of each slot beside them.

    #  2 ranks of 2 experts    token 0: experts 0 1 3     all_to_all sends 3 rows, this one to rank 0 and to rank 1

    The rank of the experts sums their outputs, so that a token also returns once from each rank, and once in the
    backward pass. With k = 8 and even loads over 8 ranks that are 5.3 copies instead of 8. A token's sum runs by rank,
    in the order of the ranks' first slots, then by slot; so it differs from that of `all_to_all` in its last bits.
    """

    def begin(self, x: Tensor, decision: RoutingDecision) -> "_TokenExchange":
        """Start to send tokens of x (T, D) to the ranks of their experts."""
        with self.step_timer.within("dispatch"):
            slots, dtype = TokenSlots.of(decision), compute_dtype(x)
            rank = self.rank_of(slots.expert_index)  # (T, k)
            first_of_rank = self._first_slots(rank)
            counts = self._gather_sizes(first_of_rank, rank)
            slots = slots.widened(max(row[-1] for row in counts))
            sizes = [row[: self.group.size] for row in counts]
            order = order_by_expert(first_of_rank, self.group.size, num_rows=sum(sizes[self.group.index]))
            tokens = order.token_of_row
            return _TokenExchange(
                order=order,
                sizes=sizes,
                num_rows=sum(row[self.group.size + self.group.index] for row in counts),
                rows=self.start(gather_rows(x.to(dtype), order), sizes),
                weight=self.depart(slots.weight.index_select(0, tokens), sizes),
                expert=self.depart(slots.expert_index.index_select(0, tokens).to(torch.int32), sizes),
                dtype=dtype,
            )

    def compute(self, begun: "_TokenExchange", experts: RunExperts) -> "_SumExchange":
        """Apply the experts, and start to send each token's sum back."""
        within = self.step_timer.within
        with within("dispatch"):
            first, end = self.bounds[self.group.index]
            x, weight, expert = begun.rows.wait().to(begun.dtype), begun.weight.wait(), begun.expert.wait().long()
            is_here = (expert >= first) & (expert < end)
            expert_index = torch.where(is_here, expert - first, end - first)
        y = self.apply(Dispatched(x=x, expert_index=expert_index, weight=weight, num_rows=begun.num_rows), experts)
        with within("combine"):
            back = [list(column) for column in zip(*begun.sizes, strict=True)]
            wide = torch.promote_types(begun.dtype, weight.dtype)
            return _SumExchange(begun.order, self.start(y.to(begun.dtype), back), begun.dtype, wide)

    def finish(self, computed: "_SumExchange") -> Tensor:
        """Wait for each token's sums, and sum over ranks."""
        with self.step_timer.within("combine"):
            rows = computed.rows.wait().to(computed.dtype)
            return sum_rows(rows, computed.order, dtype=computed.dtype_of_sum)

    def _first_slots(self, rank: Tensor) -> Tensor:
        """Return the ranks (T, k) of slots, with G for none also where an earlier slot of the token has the same."""
        number = torch.arange(rank.shape[1], device=rank.device)
        is_earlier = number[None, :] < number[:, None]  # (k, k)
        is_repeated = ((rank[:, :, None] == rank[:, None, :]) & is_earlier).any(-1)
        return torch.where(is_repeated, self.group.size, rank)

    def _gather_sizes(self, first_of_rank: Tensor, rank: Tensor) -> list[list[int]]:
        """Return (G, 2 G + 1): for each rank its tokens to each rank, its assignments to each, and its k. One wait."""
        size = self.group.size
        counts = [count_slots(of_slots, size) for of_slots in (first_of_rank, rank)]
        num_slots = rank.new_full((1,), rank.shape[1])  # differs between ranks if the number of experts varies by token
        return self.gather_counts(torch.cat([*counts, num_slots]))[1]


class _TokenExchange(NamedTuple):
    """Tokens under way to the ranks of their experts, with the expert and the combine weight of each slot."""

    order: ExpertOrder
    """Order of the copies, by rank."""
    sizes: list[list[int]]
    """(G, G) tokens from each rank to each rank."""
    num_rows: int
    """Assignments of the tokens that arrive here."""
    rows: AllToAll
    weight: AllToAll
    expert: AllToAll
    dtype: torch.dtype
    """Dtype of the rows."""


class _SumExchange(NamedTuple):
    """Sums of tokens under way from the ranks of their experts."""

    order: ExpertOrder
    rows: AllToAll
    dtype: torch.dtype
    dtype_of_sum: torch.dtype
