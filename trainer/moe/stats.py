"""What one MoE layer reports of one forward pass: sums, per row of the batch.

Nothing here is reduced over rows or ranks.

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
    """(B, E) int64 assignments that are their token's first."""
    prob_sum: Tensor | None
    """(B, E) router probabilities; None if the router has none, as for the two below."""
    z_sum: Tensor | None
    """(B,) squared logsumexp of the logits."""
    dropped: Tensor
    """(B,) int64 assignments over capacity."""
    tokens: Tensor
    """(B,) int64 counted tokens."""
    entropy_sum: Tensor | None
    """(B,) entropy of the router probabilities, in nats; no gradient."""


def account(routed: RouterOutput, limited: RoutingDecision, context: RoutingContext) -> MoEStats:
    """Sum up what a layer did.

    Args:
        routed: the router's output, before drops.
        limited: the same decision after `limit_to_capacity`.
        context: of the same tokens.
    """
    decision, rows = routed.decision, context.num_sequences
    counted = decision.kept if context.counted is None else decision.kept & context.counted[decision.token_index]
    row = context.sequence_index[decision.token_index]  # (A,)
    first = torch.ones_like(decision.kept)
    first[1:] = decision.token_index[1:] != decision.token_index[:-1]
    prob_sum = z_sum = entropy_sum = None
    tokens = (context.valid if context.counted is None else context.counted).view(rows, -1)
    if routed.probs is not None:
        probs = routed.probs.view(*tokens.shape, -1)  # (B, S, E)
        prob_sum = (probs * tokens[..., None]).sum(1)
        entropy = torch.special.entr(probs.detach()).sum(-1)
        entropy_sum = (entropy * tokens).sum(1)
    if routed.logits is not None:
        z_sum = (routed.logits.logsumexp(-1).square().view(tokens.shape) * tokens).sum(1)
    return MoEStats(
        counts=_count(decision, row, counted, rows),
        first_choice_counts=_count(decision, row, counted & first, rows),
        prob_sum=prob_sum,
        z_sum=z_sum,
        dropped=torch.bincount(row, weights=(counted & ~limited.kept).double(), minlength=rows).long(),
        tokens=tokens.sum(1),
        entropy_sum=entropy_sum,
    )


def _count(decision: RoutingDecision, row: Tensor, counted: Tensor, rows: int) -> Tensor:
    """Return (B, E) counts of the assignments where `counted` (A,) holds."""
    cells = rows * decision.num_experts
    counted = counted & (decision.expert_index < decision.num_experts)  # null experts have no column here
    cell = torch.where(counted, row * decision.num_experts + decision.expert_index, cells)
    return torch.bincount(cell, minlength=cells + 1)[:cells].view(rows, decision.num_experts)
