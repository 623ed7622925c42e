"""The load-balancing loss, over experts or groups of them.

# B sequences, E experts, L MoE layers, n null experts, G groups.
"""

import torch
from torch import Tensor

from trainer.moe.config import BalanceConfig, MoEConfig
from trainer.moe.loss_stats import LossStats, choice_counts
from trainer.moe.stats import MoEStats


def balance_loss(stats: MoEStats, config: MoEConfig, *, known: LossStats | None) -> Tensor:
    """Return one layer's balance loss summed over tokens: n * E * sum_e f_e P_e for each scope of n tokens, added up.

    f_e is the share of assignments that went to expert e, before drops and without gradient; P_e is the mean router
    probability of e over the scope, so n * P_e is a sum. Balanced routing gives 1 per token for every E and k. Null
    experts count as n more experts, all with the same share of what went to them together.

    Args:
        stats: of one MoE layer.
        config: scope, convention and null experts.
        known: of the step, for `scope: global_batch`; None: the micro-batch's own counts.

    Returns:
        Scalar in the dtype of the probabilities.

    Source: Fedus et al. 2021 (arXiv 2101.03961), eq. 4, with f over all k choices; first choices only under
        `gshard_first_choice` (arXiv 2006.16668). Scope `sequence`: DeepSeek-V3 (arXiv 2412.19437); `global_batch`:
        arXiv 2501.11873. Null experts: AdaMoE (arXiv 2406.13233).
    """
    assert stats.prob_sum is not None, "the router has no probabilities"
    share = _share(_counts_in_scope(stats, config.balance, known), stats.prob_sum)  # f: (B or 1, E or E + 1)
    return _product(share, stats.prob_sum, config)


def device_balance_loss(stats: MoEStats, config: MoEConfig, *, known: LossStats | None) -> Tensor:
    """Return one layer's balance loss between groups of experts, summed over tokens, in the units of `balance_loss`.

    n * G * sum_g F_g P_g, where F_g and P_g are sums of f_e and P_e over a group's experts.

    Source: DeepSeek-V2 (arXiv 2405.04434), eqs. 26 to 28, with f as a share instead of a multiple of the fair one.
    """
    assert stats.prob_sum is not None, "the router has no probabilities"
    groups = config.device_balance.groups
    share = _share(_counts_in_scope(stats, config.balance, known), stats.prob_sum)
    in_groups = [part.unflatten(-1, (groups, -1)).sum(-1) for part in (share, stats.prob_sum)]  # (B or 1, G)
    return groups * (in_groups[0] * in_groups[1]).sum()


def global_balance_loss(counts: Tensor, prob_sum: Tensor, *, routed_tokens: int, config: MoEConfig) -> Tensor:
    """Return the balance loss of a whole step per token, mean over layers, from its summed counts and probabilities.

    For logging where the loss has no coefficient, so that no counting pass is spent on it; no gradient.

    Args:
        counts: (L, E) assignments that f is made of, or (L, E + 1).
        prob_sum: router probabilities, summed over the step's tokens, of the same shape.
        routed_tokens: N_g.
        config: null experts.
    """
    return _product(_share(counts, prob_sum), prob_sum, config) / (len(counts) * routed_tokens)


def convention_scale(config: MoEConfig, *, num_moe_layers: int) -> float:
    """Return what a coefficient of the configured convention is multiplied by to mean the same here.

    transformers does not divide f by k (and pools its layers before the product, so this is exact for one layer);
    Megatron sums over layers instead of averaging.
    """
    match config.balance.convention:
        case "hf":  # f is a share of all k choices, null experts among them
            return getattr(config.router, "top_k", config.experts_per_token)
        case "megatron":
            return num_moe_layers
        case _:
            return 1


def _counts_in_scope(stats: MoEStats, config: BalanceConfig, known: LossStats | None) -> Tensor:
    """Return (B or 1, E or E + 1): the counts of each scope."""
    if config.scope == "global_batch" and known is not None:
        return known.counts[None]
    counts = choice_counts(stats, config)
    return counts if config.scope == "sequence" else counts.sum(0, keepdim=True)


def _share(counts: Tensor, like: Tensor) -> Tensor:
    return counts.to(like) / counts.sum(-1, keepdim=True).clamp(min=1)


def _product(share: Tensor, prob_sum: Tensor, config: MoEConfig) -> Tensor:
    """Return E * sum_e f_e P_e; the n null experts, which share the last column, count as n experts alike."""
    nulls = config.router.num_null_experts
    per_column = share * prob_sum
    if nulls:
        alike = torch.ones(share.shape[-1], dtype=share.dtype, device=share.device)
        alike[-1] = nulls
        per_column = per_column / alike
    return (config.num_experts + nulls) * per_column.sum()
