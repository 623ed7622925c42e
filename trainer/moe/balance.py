"""Losses that balance the load over experts: the balance loss, its grouped form, and squared coefficients of variation.

# B sequences, E experts, L MoE layers, n null experts, G groups.
"""

from typing import Literal

import torch
from torch import Tensor

from trainer.moe.layer_options import BalanceConfig
from trainer.moe.loss_stats import LossStats, RowStats, choice_counts
from trainer.moe.stats import MoEStats
from trainer.moe.terms import AuxLosses


def balance_loss(
    stats: MoEStats, losses: AuxLosses, *, global_stats: LossStats | None, row_stats: RowStats | None = None
) -> Tensor:
    """Return one layer's balance loss, summed over tokens: n * E * sum_e f_e P_e for each scope of n tokens.

    f_e is the fraction of assignments to expert e, before drops and without gradient; P_e is the mean router
    probability of e over the scope, so n * P_e is a sum. Uniform routing gives 1 per token for every E and k. Null
    experts count as n more experts, each with an equal share of the assignments to all of them.

    Without `global_stats`, the layer's sums over the step, `scope: global_batch` uses the micro-batch's own. Without
    `row_stats`, rows are whole; else these have the sums of whole rows, and the value is the share of what is here.

    Source: Fedus et al. 2021 (arXiv 2101.03961), eq. 4, with f over all k choices; over first choices only under
        `gshard_first_choice` (arXiv 2006.16668). Scope `sequence`: DeepSeek-V3 (arXiv 2412.19437); `global_batch`:
        arXiv 2501.11873. Null experts: AdaMoE (arXiv 2406.13233).
    """
    assert stats.prob_sum is not None, "the router has no probabilities"
    counts = _counts_in_scope(stats, losses.balance, global_stats, row_stats)
    share = _share(counts, stats.prob_sum)  # f: (B or 1, E or E + 1)
    return _product(share, stats.prob_sum, losses.num_null_experts)


def device_balance_loss(
    stats: MoEStats, losses: AuxLosses, *, global_stats: LossStats | None, row_stats: RowStats | None = None
) -> Tensor:
    """Return one layer's balance loss over groups of experts, summed over tokens, in the units of `balance_loss`.

    n * G * sum_g F_g P_g, where F_g and P_g are the sums of f_e and P_e over a group's experts.

    Source: DeepSeek-V2 (arXiv 2405.04434), eqs. 26 to 28, with f as a fraction instead of a multiple of the fair share.
    """
    assert stats.prob_sum is not None, "the router has no probabilities"
    groups = losses.device_balance.groups
    share = _share(_counts_in_scope(stats, losses.balance, global_stats, row_stats), stats.prob_sum)
    in_groups = [part.unflatten(-1, (groups, -1)).sum(-1) for part in (share, stats.prob_sum)]  # (B or 1, G)
    return groups * (in_groups[0] * in_groups[1]).sum()


def global_balance_loss(counts: Tensor, prob_sum: Tensor, *, routed_tokens: int, num_null_experts: int) -> Tensor:
    """Return the balance loss of a whole step per token, averaged over layers, from its reduced sums.

    For logging a loss without a coefficient, which is not worth a counting pass; has no gradient.

    `counts` and `prob_sum`, over the step's tokens, are (L, E), or (L, E + 1) with null experts.
    """
    return _product(_share(counts, prob_sum), prob_sum, num_null_experts) / (len(counts) * routed_tokens)


def convention_scale(losses: AuxLosses, *, num_moe_layers: int) -> float:
    """Return the factor that converts a coefficient of the configured convention to ours.

    transformers does not divide f by k (and pools its layers before the product, so this is exact for one layer only);
    Megatron sums over layers instead of averaging.
    """
    match losses.balance.convention:
        case "hf":  # f is a fraction of all k choices, null experts included
            return losses.choices_per_token
        case "megatron":
            return num_moe_layers
        case _:
            return 1


def _counts_in_scope(
    stats: MoEStats, balance: BalanceConfig, global_stats: LossStats | None, row_stats: RowStats | None
) -> Tensor:
    """Return (B or 1, E or E + 1): the counts of each scope."""
    if balance.scope == "global_batch" and global_stats is not None:
        return global_stats.counts[None]
    counts = choice_counts(stats, balance) if row_stats is None else row_stats.counts
    return counts if balance.scope == "sequence" else counts.sum(0, keepdim=True)


def _share(counts: Tensor, like: Tensor) -> Tensor:
    return counts.to(like) / counts.sum(-1, keepdim=True).clamp(min=1)


def _product(share: Tensor, prob_sum: Tensor, num_null_experts: int) -> Tensor:
    """Return E * sum_e f_e P_e; the n null experts, merged in the last column, count as n equal experts."""
    per_column, num_experts = share * prob_sum, share.shape[-1]
    if num_null_experts:
        alike = torch.ones(num_experts, dtype=share.dtype, device=share.device)
        alike[-1] = num_null_experts
        per_column, num_experts = per_column / alike, num_experts - 1 + num_null_experts
    return num_experts * per_column.sum()


def cv_squared(sums: Tensor) -> Tensor:
    """Return (...): variance over squared mean of sums (..., E); 0 if they are uniform, or all 0.

    Source: Shazeer et al. 2017 (arXiv 1701.06538), eqs. 7 and 11, with the population variance.
    """
    mean = sums.mean(-1)
    variance = sums.var(-1, correction=0)
    return torch.where(mean > 0, variance / mean.where(mean > 0, 1).square(), 0)


def cv_squared_loss(
    local: Tensor,
    tokens: Tensor,
    *,
    scope: Literal["sequence", "global_batch"],
    step_sums: Tensor | None,
    routed_tokens: int,
    rows: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Return a micro-batch's share of one layer's loss, times N_g: values and gradients of a step sum to N_g * CV^2.

    CV^2 of the global batch is a function of a sum over micro-batches and ranks, so it is not a sum of theirs. Given
    the sum S over the step, each micro-batch contributes

        (tokens here) * CV^2(S) + N_g * sum_e dCV^2/dS_e (S) * (local_e - local_e without gradient)

    whose values sum to N_g * CV^2(S), and whose gradients to the gradient of that. So does each part of a row, with
    the sums and tokens of its whole row.

    Args:
        local: (B, E) sums of this micro-batch's rows, with gradient.
        tokens: (B,) of each row.
        scope: tokens over which the variation is computed.
        step_sums: (E,) sums over the whole step; None: this micro-batch is the whole step.
        routed_tokens: N_g.
        rows: (B, E) sums and (B,) tokens of the whole rows, if parts of them are here.
    """
    if scope == "sequence":
        if rows is None:
            return (cv_squared(local) * tokens).sum()
        return _share_of_cv_squared(local, tokens, *rows)
    here = local.sum(0)  # (E,)
    return _share_of_cv_squared(here, tokens.sum(), here if step_sums is None else step_sums, routed_tokens)


def _share_of_cv_squared(here: Tensor, tokens: Tensor, whole: Tensor, num_tokens: Tensor | int) -> Tensor:
    """Return the share of sums `here` (..., E) over some tokens in CV^2 of `whole` (..., E), times its tokens."""
    whole = whole.detach().requires_grad_()
    with torch.enable_grad():
        value = cv_squared(whole)  # (...)
        (slope,) = torch.autograd.grad(value.sum(), whole)
    return (tokens * value.detach() + num_tokens * (slope * (here - here.detach())).sum(-1)).sum()
