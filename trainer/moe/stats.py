"""Statistics of one MoE layer in one forward pass: sums per row of the batch, not reduced over rows or ranks.

# B sequences, T = B * S tokens, A assignments, E experts.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.moe.routing import RouterOutput, RoutingContext, RoutingDecision


@dataclass(frozen=True, slots=True, kw_only=True)
class MoEStats:
    """Sums over the counted tokens of each row; `prob_sum` and `z_sum` carry gradients."""

    counts: Tensor
    """(B, E) int64 assignments before drops."""
    first_choice_counts: Tensor
    """(B, E) int64 assignments that are the first of their token."""
    prob_sum: Tensor | None
    """(B, E) router probabilities, or (B, E + 1) with null experts; None if the router has none."""
    z_sum: Tensor | None
    """(B,) squared logsumexp of the logits; None if the router has none."""
    dropped: Tensor
    """(B,) int64 assignments over capacity."""
    tokens: Tensor
    """(B,) int64 counted tokens."""
    entropy_sum: Tensor | None
    """(B,) entropy of the router probabilities in nats, without gradient; None if the router has none."""
    null_counts: Tensor | None = None
    """(B,) int64 assignments to null experts; None if there are none."""
    importance: Tensor | None = None
    """(B, E) combine weights before drops. Like those below, it has a gradient and is None if no loss needs it."""
    load: Tensor | None = None
    """(B, E) smooth counts."""
    similarity_sum: Tensor | None = None
    """(B,) mean squared cosine between the outputs of a token's experts."""
    router_loss: Tensor | None = None
    """(B,) the router's own loss, including its coefficient."""
    routed: RouterOutput | None = None
    """Output of the router, if requested."""

    def choices(self) -> Tensor:
        """Return (E,) int64 assignments before drops over all rows, followed by those to null experts if there are any.

        `Router.update` takes them, summed over an optimizer step.
        """
        counts = self.counts.sum(0)
        return counts if self.null_counts is None else torch.cat([counts, self.null_counts.sum()[None]])


def collect_stats(
    routed: RouterOutput,
    limited: RoutingDecision,
    context: RoutingContext,
    *,
    needs_importance: bool = False,
    expert_similarity: Tensor | None = None,
) -> MoEStats:
    """Return the statistics of a layer.

    `limited` is the router's decision after `limit_to_capacity`; importance and expert similarity (T,) are for losses.
    """
    decision, rows = routed.decision, context.num_sequences
    counted = decision.kept if context.counted is None else decision.kept & context.counted[decision.token_index]
    row = context.sequence_index[decision.token_index]  # (A,)
    first = torch.ones_like(decision.kept)
    first[1:] = decision.token_index[1:] != decision.token_index[:-1]
    tokens = (context.valid if context.counted is None else context.counted).view(rows, -1)  # (B, S)

    def per_row(values: Tensor | None) -> Tensor | None:
        """Sum (T, ...) over the counted tokens of each row."""
        if values is None:
            return None
        values = values.view(*tokens.shape, *values.shape[1:])  # (B, S, ...)
        return (values * tokens.view(*tokens.shape, *(1 for _ in values.shape[2:]))).sum(1)

    probs, logits = routed.probs, routed.logits
    has_nulls = probs is not None and probs.shape[-1] > decision.num_experts
    null = counted & (decision.expert_index >= decision.num_experts)
    return MoEStats(
        counts=_count(decision, row, counted, rows),
        first_choice_counts=_count(decision, row, counted & first, rows),
        prob_sum=per_row(probs),
        z_sum=per_row(None if logits is None else logits.logsumexp(-1).square()),
        dropped=_sum_rows(counted & ~limited.kept, row, rows),
        tokens=tokens.sum(1),
        entropy_sum=per_row(None if probs is None else torch.special.entr(probs.detach()).sum(-1)),
        null_counts=_sum_rows(null, row, rows) if has_nulls else None,
        importance=_importance(decision, row, counted, rows) if needs_importance else None,
        load=per_row(routed.load),
        similarity_sum=per_row(expert_similarity),
        router_loss=per_row(routed.loss),
        routed=routed if context.return_router_outputs else None,
    )


def _sum_rows(marked: Tensor, row: Tensor, rows: int) -> Tensor:
    """Return (B,) int64: the number of marked assignments of each row."""
    return torch.bincount(row, weights=marked.double(), minlength=rows).long()


def _cells(decision: RoutingDecision, row: Tensor, counted: Tensor, rows: int) -> Tensor:
    """Return (A,): index of the (row, expert) cell of each counted assignment; B * E for all others."""
    counted = counted & (decision.expert_index < decision.num_experts)  # null experts have no column
    return torch.where(counted, row * decision.num_experts + decision.expert_index, rows * decision.num_experts)


def _count(decision: RoutingDecision, row: Tensor, counted: Tensor, rows: int) -> Tensor:
    """Return (B, E) counts of the assignments where `counted` (A,) holds."""
    cells = rows * decision.num_experts
    per_cell = torch.bincount(_cells(decision, row, counted, rows), minlength=cells + 1)
    return per_cell[:cells].view(rows, decision.num_experts)


def _importance(decision: RoutingDecision, row: Tensor, counted: Tensor, rows: int) -> Tensor:
    """Return (B, E) sums of the combine weights of the counted assignments."""
    cells = rows * decision.num_experts
    zero = decision.combine_weight.new_zeros(cells + 1)
    sums = zero.index_add(0, _cells(decision, row, counted, rows), decision.combine_weight)
    return sums[:cells].view(rows, decision.num_experts)
