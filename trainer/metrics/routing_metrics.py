"""Compute routing metrics from counters summed over steps.

# L MoE layers, E experts.
"""

import torch
from torch import Tensor


def routing_metrics(
    counts: Tensor, dropped: Tensor, tokens: Tensor, entropy_sum: Tensor | None
) -> dict[str, float | None]:
    """Return the routing keys of metrics.jsonl.

    Args:
        counts: (L, E) assignments before drops.
        dropped: (L,) assignments over capacity.
        tokens: (L,) valid tokens.
        entropy_sum: (L,) entropy of the router probabilities, or None.

    Returns:
        drop_rate: dropped over all assignments.
        load_imbalance: load of the busiest expert over the mean, in the worst layer; 1 is even.
        dead_experts: experts without an assignment, over all layers.
        router_entropy: nats per token, mean over layers.
        experts_per_token: experts a token asked for, mean over layers; null experts do not count.
    """
    load = counts.double()
    mean = load.mean(-1).clamp(min=1e-12)
    entropy = None if entropy_sum is None else float((entropy_sum.double() / tokens.clamp(min=1)).mean())
    return {
        "drop_rate": float(dropped.sum()) / max(1.0, float(load.sum())),
        "load_imbalance": float((load.amax(-1) / mean).max()),
        "dead_experts": float((counts == 0).sum()),
        "router_entropy": entropy,
        "experts_per_token": float(load.sum()) / max(1.0, float(tokens.sum())),
    }


def router_metrics(
    *, tokens: Tensor, entropy_sum: Tensor | None, prob_sum: Tensor | None, router_squares: Tensor | None
) -> dict[str, list[float | None]]:
    """Return the keys of routing.jsonl about routers, by layer; those that a router does not have are left out.

    Args:
        tokens: (L,) valid tokens.
        entropy_sum: (L,) entropy of the router probabilities.
        prob_sum: (L, E) router probabilities, or (L, E + 1) with null experts.
        router_squares: (L,) squared norm of the router's gradient, NaN where it is frozen.

    Returns:
        entropy: nats per token.
        token_information: nats: entropy of the mean probabilities minus `entropy`; the mutual information of token and
            expert if experts are drawn by probability. 0 where all tokens have the same probabilities.
        prob_span: largest minus smallest mean probability of an expert.
        router_grad_norm: 2-norm of the router's gradient.
    """
    routed, keys = tokens.double().clamp(min=1), dict[str, Tensor]()
    if entropy_sum is not None:
        keys["entropy"] = entropy_sum.double() / routed
    if prob_sum is not None:
        mean = prob_sum.double() / routed[:, None]
        if entropy_sum is not None:
            mean = mean / mean.sum(-1, keepdim=True).clamp(min=1e-12)
            keys["token_information"] = torch.special.entr(mean).sum(-1) - keys["entropy"]
        keys["prob_span"] = mean.amax(-1) - mean.amin(-1)
    if router_squares is not None:
        keys["router_grad_norm"] = router_squares.sqrt()
    return {key: [None if value != value else value for value in values.tolist()] for key, values in keys.items()}


def replay_metrics(
    *,
    replaced: Tensor,
    replaced_tokens: Tensor,
    replaced_somewhere: Tensor,
    missed_mass: Tensor,
    tokens: Tensor,
    top_k: int,
) -> tuple[dict[str, float], dict[str, dict[str, list[float]]]]:
    """Return how far the live routers disagree with the experts that were given: a record, and the values by layer.

    replay_other_experts: fraction of given experts that the router would not have chosen, mean over layers.
    replay_other_tokens: fraction of tokens with such an expert, mean over layers.
    replay_other_somewhere: fraction of tokens with such an expert in any layer.
    replay_missed_mass: share of the scores that the router's choice has and the given experts have not; negative where
        a selection bias prefers lower scores.
    """
    routed = tokens.double().clamp(min=1)  # (L,)
    by_layer = {
        "other_experts": replaced / (routed * top_k),
        "other_tokens": replaced_tokens / routed,
        "missed_mass": missed_mass / routed,
    }
    record = {f"replay_{name}": float(values.mean()) for name, values in by_layer.items()}
    record["replay_other_somewhere"] = float(replaced_somewhere / routed[0])
    return record, {"replay": {name: values.tolist() for name, values in by_layer.items()}}
