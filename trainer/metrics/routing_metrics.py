"""Compute routing metrics from counters summed over steps.

# L MoE layers, E experts.
"""

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
