"""The objective: cross-entropy and auxiliary losses, summed everywhere and divided once.

    objective = (CE_sum + coef_v * V) / T_g + 1/L sum over MoE layers of (coef_b * B + coef_z * Z + ...) / N_g

V is the squared logsumexp of the vocabulary's logits, summed over target tokens. T_g is the number of target tokens
and N_g that of valid routed tokens of the whole optimizer step, over all ranks and micro-batches. The objective of a
step is therefore the plain sum of its micro-batches' shares, however it is split. If documents have weights, CE_sum
and V are weighted sums, and T_g is the sum of the weights.

# B sequences, E experts, L MoE layers.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trainer.moe.balance import balance_loss, convention_scale, cv_squared_loss, device_balance_loss
from trainer.moe.loss_stats import LossStats, RowStats
from trainer.moe.stats import MoEStats
from trainer.moe.terms import AuxLosses


@dataclass(frozen=True, slots=True, kw_only=True)
class Denominators:
    """Divisors of the sums of one optimizer step, counted before its first forward pass."""

    target_tokens: float
    """T_g: the number of target tokens, or the sum of their weights."""
    routed_tokens: int
    """N_g."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """One micro-batch's share of the objective, and its parts in canonical units; shares sum over micro-batches."""

    total: Tensor
    """Scalar with gradient."""
    loss: Tensor
    """Cross-entropy in nats per target token; no gradient."""
    balance_loss: Tensor | None
    """Mean over MoE layers, per routed token, without coefficient: 1 if balanced. None without router probabilities."""
    z_loss: Tensor | None
    """Mean over MoE layers, per routed token, without coefficient. None without router logits."""
    extra: dict[str, Tensor] = field(default_factory=dict)
    """The other losses that are on, by name, in the same units; `router` includes its coefficient."""


def objective(
    loss_sum: Tensor,
    moe: Sequence[MoEStats],
    *,
    global_stats: LossStats | None,
    denominators: Denominators,
    losses: AuxLosses | None,
    num_moe_layers: int | None = None,
    vocab_z: tuple[float, Tensor] | None = None,
    row_stats: RowStats | None = None,
) -> Objective:
    """Return one micro-batch's share of the objective; `loss_sum` is its cross-entropy summed over target tokens.

    Without `global_stats`, losses over the global batch use this micro-batch's sums; without `row_stats`, its rows are
    whole. A dense model has no `losses`.
    `num_moe_layers` are those of the whole model, if `moe`, `global_stats` and `row_stats` are of some of them.
    `vocab_z` is a coefficient, and the squared logsumexp of the vocabulary's logits summed over target tokens.
    """
    loss = loss_sum / denominators.target_tokens
    total, extra = loss, dict[str, Tensor]()
    if vocab_z is not None:
        coef, z_sum = vocab_z
        total = total + coef * z_sum / denominators.target_tokens
        extra["vocab_z"] = z_sum.detach() / denominators.target_tokens
    if losses is None or not moe:
        return Objective(total=total, loss=loss.detach(), balance_loss=None, z_loss=None, extra=extra)
    num_moe_layers = num_moe_layers or len(moe)
    per_layer_token = 1 / (num_moe_layers * denominators.routed_tokens)
    layers = [
        (
            stats,
            None if global_stats is None else global_stats.layer(i),
            None if row_stats is None else row_stats.layer(i),
        )
        for i, stats in enumerate(moe)
    ]
    balance, z = None, None
    if all(stats.prob_sum is not None for stats in moe):
        parts = [balance_loss(stats, losses, global_stats=sums, row_stats=rows) for stats, sums, rows in layers]
        balance = torch.stack(parts).sum() * per_layer_token
        total = total + losses.balance.coef * convention_scale(losses, num_moe_layers=num_moe_layers) * balance
    if all(stats.z_sum is not None for stats in moe):
        z = torch.stack([z_loss(stats) for stats in moe]).sum() * per_layer_token
        total = total + losses.z_loss_coef * z
    for stats, sums, rows in layers:
        for name, (coef, value) in extra_losses(stats, sums, rows, denominators, losses).items():
            total = total + coef * value * per_layer_token
            extra[name] = extra.get(name, 0) + value.detach() * per_layer_token
    return Objective(
        total=total,
        loss=loss.detach(),
        balance_loss=None if balance is None else balance.detach(),
        z_loss=None if z is None else z.detach(),
        extra=extra,
    )


def extra_losses(
    stats: MoEStats,
    global_stats: LossStats | None,
    row_stats: RowStats | None,
    denominators: Denominators,
    losses: AuxLosses,
) -> dict[str, tuple[float, Tensor]]:
    """Return coefficient and value of each further loss of one layer that is on, by name; values sum over tokens."""
    scope, n_g = losses.cv_squared.scope, denominators.routed_tokens
    found: dict[str, tuple[float, Tensor]] = {}
    for term in losses.terms():
        match term.name:
            case "importance" | "load":
                value, step_sums = getattr(stats, term.name), getattr(global_stats, term.name, None)
                rows = None if row_stats is None else (getattr(row_stats, term.name), row_stats.tokens)
                if value is not None:
                    value = cv_squared_loss(
                        value, stats.tokens, scope=scope, step_sums=step_sums, routed_tokens=n_g, rows=rows
                    )
            case "device_balance":
                value = device_balance_loss(stats, losses, global_stats=global_stats, row_stats=row_stats)
            case "diversity":
                value = stats.similarity_sum
            case "router":
                value = stats.router_loss
            case _:  # balance and z-loss
                value = None
        if value is not None:
            found[term.name] = term.coef, value.sum()
    return found


def z_loss(stats: MoEStats) -> Tensor:
    """Return one layer's z-loss summed over tokens: the squared logsumexp of the raw logits (arXiv 2202.08906)."""
    assert stats.z_sum is not None, "the router has no logits"
    return stats.z_sum.sum()
