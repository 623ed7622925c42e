"""Reference mixture of experts, as loops over tokens and experts: slow and obvious.

Written from the formulas (DESIGN 4), not from the code: no sorting, no stacking, no index arithmetic. Differentiable.

# T tokens, k experts per token, E experts, D d_model.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Routed:
    """Routing decision of the reference."""

    experts: list[list[int]]  # per token, best first; empty for padding
    weights: list[list[Tensor]]
    probs: Tensor  # (T, E)
    logits: Tensor  # (T, E)


def route(x: Tensor, gate: Tensor, valid: Tensor, *, top_k: int, score: str, normalize: bool, scale: float) -> Routed:
    """Score tokens and take the best expert k times (the first among ties), weighted by normalised or raw scores."""
    logits = torch.stack([torch.stack([(token * row).sum() for row in gate]) for token in x])
    experts, weights, probs = [], [], []
    for t in range(len(x)):
        if score == "softmax":
            total = sum(torch.exp(value) for value in logits[t])
            scores = [torch.exp(value) / total for value in logits[t]]
        else:
            scores = [1 / (1 + torch.exp(-value)) for value in logits[t]]
        total_score = sum(scores)
        probs.append(torch.stack([s / total_score for s in scores]))
        chosen: list[int] = []
        while valid[t] and len(chosen) < top_k:
            best = max(
                (e for e in range(len(scores)) if e not in chosen), key=lambda e: (float(scores[e].detach()), -e)
            )
            chosen.append(best)
        chosen_sum = sum((scores[e] for e in chosen), torch.zeros((), dtype=x.dtype))
        experts.append(chosen)
        weights.append([scale * (scores[e] / chosen_sum if normalize else scores[e]) for e in chosen])
    return Routed(experts=experts, weights=weights, probs=torch.stack(probs), logits=logits)


def moe_output(x: Tensor, routed: Routed, w_in: Tensor, w_out: Tensor, activation: object) -> Tensor:
    """Return y_t = sum over its experts of weight * expert(x_t)."""
    rows = []
    for t, token in enumerate(x):
        y = torch.zeros_like(token)
        for expert, weight in zip(routed.experts[t], routed.weights[t], strict=True):
            y = y + weight * expert_output(token, w_in[expert], w_out[expert], activation)
        rows.append(y)
    return torch.stack(rows)


def expert_output(token: Tensor, w_in: Tensor, w_out: Tensor, activation: object) -> Tensor:
    """Apply one expert to one token."""
    h = w_in @ token
    if activation == "gelu":
        return w_out @ (h * 0.5 * (1 + torch.erf(h / 2**0.5)))
    gate, up = h[: len(h) // 2], h[len(h) // 2 :]
    return w_out @ (gate / (1 + torch.exp(-gate)) * up)


def balance_loss(routed: Routed, scopes: list[list[int]], *, first_choice_only: bool = False) -> Tensor:
    """Return the sum over scopes (lists of valid tokens) of n * E * sum_e f_e P_e."""
    num_experts = routed.probs.shape[1]
    total = torch.zeros((), dtype=routed.probs.dtype)
    for tokens in scopes:
        choices = [routed.experts[t][:1] if first_choice_only else routed.experts[t] for t in tokens]
        assignments = sum(len(c) for c in choices)
        for e in range(num_experts):
            f = sum(c.count(e) for c in choices) / max(1, assignments)
            p = sum((routed.probs[t, e] for t in tokens), torch.zeros((), dtype=total.dtype)) / max(1, len(tokens))
            total = total + len(tokens) * num_experts * f * p
    return total


def z_loss(routed: Routed, tokens: list[int]) -> Tensor:
    """Return the sum over valid tokens of logsumexp squared."""
    return sum(
        (torch.log(torch.exp(routed.logits[t]).sum()) ** 2 for t in tokens), torch.zeros((), dtype=routed.logits.dtype)
    )
