"""Statistics of one MoE layer in one forward pass: sums per row of the batch, not reduced over rows or ranks.

# B sequences, T = B * S tokens, A assignments, E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.moe.routing import RouterOutput, RoutingContext, RoutingDecision

_FIRST = 1 << 32


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
    experts: Tensor | None = None
    """(T, k) int64 each token's experts before drops, if requested."""
    replaced: Tensor | None = None
    """(T,) int64 of a token's given experts, those that the router would not have chosen; 0 for tokens that are not
    counted. None: no experts were given."""
    missed_mass: Tensor | None = None
    """(B,) share of the scores of all experts that the router's choice has and the given experts have not."""

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
    counts, first_choices = _count(decision, counted, context)  # (B, E + 1)
    tokens = (context.valid if context.counted is None else context.counted).view(rows, -1)  # (B, S)
    are_all_counted = context.counted is None and context.num_valid == tokens.numel()

    def per_row(values: Tensor | None) -> Tensor | None:
        """Sum (T, ...) over the counted tokens of each row."""
        if values is None:
            return None
        values = values.view(*tokens.shape, *values.shape[1:])  # (B, S, ...)
        if not are_all_counted:
            values = values * tokens.view(*tokens.shape, *(1 for _ in values.shape[2:]))
        return values.sum(1)

    probs, log_norm = routed.probs, routed.log_norm
    if log_norm is None and routed.logits is not None:
        log_norm = routed.logits.logsumexp(-1)
    has_nulls = probs is not None and probs.shape[-1] > decision.num_experts
    return MoEStats(
        counts=counts[:, : decision.num_experts],
        first_choice_counts=first_choices[:, : decision.num_experts],
        prob_sum=per_row(probs),
        z_sum=per_row(None if log_norm is None else log_norm.square()),
        dropped=_count_dropped(decision, counted, limited, context),
        tokens=tokens.sum(1),
        entropy_sum=per_row(None if probs is None else torch.special.entr(probs.detach()).sum(-1)),
        null_counts=counts[:, decision.num_experts] if has_nulls else None,
        importance=_importance(decision, counted, context) if needs_importance else None,
        load=per_row(routed.load),
        similarity_sum=per_row(expert_similarity),
        router_loss=per_row(routed.loss),
        routed=routed if context.return_router_outputs else None,
        experts=_experts(decision) if context.return_experts else None,
        replaced=_replaced(routed, context, tokens.flatten()) if context.given is not None else None,
        missed_mass=per_row(_missed_mass(routed, context)) if context.given is not None else None,
    )


def experts_of(moe: Sequence[MoEStats], shape: torch.Size) -> Tensor:
    """Return (B, S, L, k) int32 the experts of all layers, given the shape (B, S)."""
    layers = [stats.experts for stats in moe if stats.experts is not None]
    assert len(layers) == len(moe) and layers, "they were requested"
    joined = torch.stack(layers, dim=1)  # (T, L, k)
    return joined.to(torch.int32).view(*shape, *joined.shape[1:])


def _experts(decision: RoutingDecision) -> Tensor:
    """Return (T, k) each token's experts."""
    assert decision.top_k is not None, "experts are returned from routers with a fixed k"
    return decision.expert_index.view(-1, decision.top_k)


def _replaced(routed: RouterOutput, context: RoutingContext, counted: Tensor) -> Tensor:
    """Return (T,) the number of given experts that are not in the router's own choice; 0 where not counted (T,)."""
    assert context.given is not None and routed.live_choice is not None, "the layer has checked that it replays"
    is_live = (context.given[:, :, None] == routed.live_choice[:, None, :]).any(-1)  # (T, k)
    return (~is_live).sum(-1) * counted


def _missed_mass(routed: RouterOutput, context: RoutingContext) -> Tensor:
    """Return (T,) the scores of the router's choice minus those of the given experts, as a share of all scores."""
    assert context.given is not None and routed.live_choice is not None, "the layer has checked that it replays"
    scores = routed.scores if routed.scores is not None else routed.probs
    assert scores is not None, "routers that replay have scores"
    scores = scores.detach()
    share = scores / scores.sum(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)
    return share.gather(-1, routed.live_choice).sum(-1) - share.gather(-1, context.given).sum(-1)


def _sum_cells(decision: RoutingDecision, values: Tensor, context: RoutingContext) -> Tensor:
    """Return (B, E + 1): values (A,) summed by sequence and expert; the last column is that of all null experts.

    Unlike `bincount`, whose length depends on the values, this does not wait for the device.
    """
    rows, columns = context.num_sequences, decision.num_experts + 1
    expert = decision.expert_index.clamp(max=decision.num_experts)
    if decision.top_k is not None:  # every sequence has S * k assignments
        zero = values.new_zeros(rows, columns)
        return zero.scatter_add(1, expert.view(rows, -1), values.view(rows, -1))
    cell = context.sequence_index[decision.token_index] * columns + expert
    return values.new_zeros(rows * columns).scatter_add(0, cell, values).view(rows, columns)


def _count(decision: RoutingDecision, counted: Tensor, context: RoutingContext) -> tuple[Tensor, Tensor]:
    """Return (B, E + 1) the assignments where `counted` (A,) holds, and those of them that are first choices.

    One pass counts both: first choices in the upper half of each sum.
    """
    if decision.top_k is not None:
        values = counted.long()
        values.view(-1, decision.top_k)[:, 0] *= 1 + _FIRST
    else:
        is_first = torch.ones_like(counted)
        is_first[1:] = decision.token_index[1:] != decision.token_index[:-1]
        values = counted * torch.where(is_first, 1 + _FIRST, 1)
    sums = _sum_cells(decision, values, context)
    return sums & (_FIRST - 1), sums >> 32


def _count_dropped(
    decision: RoutingDecision, counted: Tensor, limited: RoutingDecision, context: RoutingContext
) -> Tensor:
    """Return (B,) the number of counted assignments that `limited` does not keep."""
    if limited is decision:
        return counted.new_zeros(context.num_sequences, dtype=torch.int64)
    return _sum_cells(decision, (counted & ~limited.kept).long(), context).sum(1)


def _importance(decision: RoutingDecision, counted: Tensor, context: RoutingContext) -> Tensor:
    """Return (B, E) sums of the combine weights of the counted assignments."""
    weight = decision.combine_weight
    return _sum_cells(decision, weight.where(counted, 0), context)[:, : decision.num_experts]
