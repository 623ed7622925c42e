"""The objective: cross-entropy, balance loss and z-loss, summed everywhere and divided once.

    objective = CE_sum / T_g + 1/L sum over MoE layers of (coef_b * B + coef_z * Z) / N_g

T_g counts target tokens and N_g valid routed tokens of the whole optimizer step, over all ranks and micro-batches, so
the objective of a step is the plain sum of its micro-batches' shares, however it is cut.

# B sequences, E experts, L MoE layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.moe.config import BalanceConfig, MoEConfig
from trainer.moe.stats import MoEStats


@dataclass(frozen=True, slots=True, kw_only=True)
class Denominators:
    """What the sums of one optimizer step are divided by, known before its first forward pass."""

    target_tokens: int
    """T_g."""
    routed_tokens: int
    """N_g."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """One micro-batch's share of the objective, and its parts in canonical units: they sum up over micro-batches."""

    total: Tensor
    """Scalar with gradient."""
    loss: Tensor
    """Cross-entropy, nats per target token; no gradient."""
    balance_loss: Tensor | None
    """Mean over MoE layers, per routed token, without coefficient: 1 when balanced.

    None without router probabilities.
    """
    z_loss: Tensor | None
    """Mean over MoE layers, per routed token, without coefficient. None without router logits."""


def objective(
    loss_sum: Tensor,
    moe: Sequence[MoEStats],
    *,
    global_counts: Tensor | None,
    denominators: Denominators,
    config: MoEConfig | None,
) -> Objective:
    """Return one micro-batch's share of the objective.

    Args:
        loss_sum: scalar, cross-entropy summed over the micro-batch's target tokens.
        moe: one entry for each MoE layer.
        global_counts: (L, E) what f is made of under `scope: global_batch`; None: this micro-batch's own counts.
        denominators: of the whole optimizer step.
        config: the `model.moe` section; None for a dense model.
    """
    loss = loss_sum / denominators.target_tokens
    if config is None or not moe:
        return Objective(total=loss, loss=loss.detach(), balance_loss=None, z_loss=None)
    per_layer_token = 1 / (len(moe) * denominators.routed_tokens)
    total, balance, z = loss, None, None
    if all(stats.prob_sum is not None for stats in moe):
        counts = [None] * len(moe) if global_counts is None else list(global_counts)
        layers = [balance_loss(stats, config.balance, global_counts=c) for stats, c in zip(moe, counts, strict=True)]
        balance = torch.stack(layers).sum() * per_layer_token
        total = total + config.balance.coef * convention_scale(config, num_moe_layers=len(moe)) * balance
    if all(stats.z_sum is not None for stats in moe):
        z = torch.stack([z_loss(stats) for stats in moe]).sum() * per_layer_token
        total = total + config.z_loss_coef * z
    return Objective(
        total=total,
        loss=loss.detach(),
        balance_loss=None if balance is None else balance.detach(),
        z_loss=None if z is None else z.detach(),
    )


def global_balance_loss(counts: Tensor, prob_sum: Tensor, *, routed_tokens: int) -> Tensor:
    """Return the balance loss of a whole step per token, mean over layers, from its summed counts and probabilities.

    For logging where the loss has no coefficient, so that no counting pass is spent on it; no gradient.

    Args:
        counts: (L, E) assignments that f is made of.
        prob_sum: (L, E) router probabilities, summed over the step's tokens.
        routed_tokens: N_g.
    """
    share = counts.to(prob_sum) / counts.sum(-1, keepdim=True).clamp(min=1)
    return counts.shape[-1] * (share * prob_sum).sum(-1).mean() / routed_tokens


def z_loss(stats: MoEStats) -> Tensor:
    """Return one layer's z-loss summed over tokens: the squared logsumexp of the raw logits (arXiv 2202.08906)."""
    assert stats.z_sum is not None, "the router has no logits"
    return stats.z_sum.sum()


def balance_loss(stats: MoEStats, config: BalanceConfig, *, global_counts: Tensor | None) -> Tensor:
    """Return one layer's balance loss summed over tokens: n * E * sum_e f_e P_e for each scope of n tokens, added up.

    f_e is the share of assignments that went to expert e, before drops and without gradient; P_e is the mean router
    probability of e over the scope, so n * P_e is a sum. Balanced routing gives 1 per token for every E and k.

    Args:
        stats: of one MoE layer.
        config: scope and convention.
        global_counts: (E,) counts for `scope: global_batch`; None: the micro-batch's own.

    Returns:
        Scalar in the dtype of the probabilities.

    Source: Fedus et al. 2021 (arXiv 2101.03961), eq. 4, with f over all k choices; first choices only under
        `gshard_first_choice` (arXiv 2006.16668). Scope `sequence`: DeepSeek-V3 (arXiv 2412.19437); `global_batch`:
        arXiv 2501.11873.
    """
    assert stats.prob_sum is not None, "the router has no probabilities"
    counts = choice_counts(stats, config)  # (B, E)
    if config.scope == "global_batch" and global_counts is not None:
        counts = global_counts[None]  # (1, E)
    elif config.scope != "sequence":
        counts = counts.sum(0, keepdim=True)  # (1, E)
    share = counts.to(stats.prob_sum) / counts.sum(-1, keepdim=True).clamp(min=1)  # f: (B or 1, E)
    return share.shape[-1] * (share * stats.prob_sum).sum()


def choice_counts(stats: MoEStats, config: BalanceConfig) -> Tensor:
    """Return the (B, E) counts that f is made of under the convention."""
    return stats.first_choice_counts if config.convention == "gshard_first_choice" else stats.counts


def convention_scale(config: MoEConfig, *, num_moe_layers: int) -> float:
    """Return what a coefficient of the configured convention is multiplied by to mean the same here.

    transformers does not divide f by k (and pools its layers before the product, so this is exact for one layer);
    Megatron sums over layers instead of averaging.
    """
    match config.balance.convention:
        case "hf":
            return config.top_k
        case "megatron":
            return num_moe_layers
        case _:
            return 1
