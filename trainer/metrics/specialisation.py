"""Measure how much experts specialise in domains.

# G domains, E experts.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def mutual_information_bits(counts: Sequence[Sequence[float]]) -> float:
    """Return the mutual information of expert and domain of an assignment, in bits.

    Domains have equal weight, however much of their text was evaluated: I is the mean over domains g of
    KL(p(e | g) || p(e)), where p(e) is the mean of p(e | g); domains without assignments are left out. I is 0 when all
    domains use the experts alike, and at most log2 G, the entropy of the domains. With N assignments per domain, its
    sampling bias is about (G - 1)(E - 1) / (2 ln 2 G N) bits: 0.00003 for 3 domains, 8 experts and N = 131072.

    Args:
        counts: (G, E) assignments.

    Raises:
        ValueError: if `counts` is not two-dimensional or has negative values.
    """
    table = np.asarray(counts, dtype=float)
    if table.ndim != 2 or (table < 0).any():
        raise ValueError(f"counts: shape {table.shape}; (domains, experts) of numbers >= 0 is needed")
    shares = _shares(table)
    if len(shares) == 0:
        return 0.0
    mean = np.broadcast_to(shares.mean(axis=0), shares.shape)
    some = shares > 0
    return max(0.0, float((shares[some] * np.log2(shares[some] / mean[some])).sum()) / len(shares))


def domain_entropy_bits(counts: Sequence[Sequence[float]]) -> float:
    """Return the entropy of the domains that have assignments, counts (G, E): log2 of their number."""
    return math.log2(max(1, len(_shares(np.asarray(counts, dtype=float)))))


def specialisation_metrics(counts: Sequence[Sequence[Sequence[float]]]) -> dict[str, float]:
    """Return the expert-domain keys of metrics.jsonl for assignments (layers, G, E); empty with fewer than two domains.

    Returns:
        eval/expert_domain_mi: mutual information in bits, mean over layers.
        eval/expert_domain_mi_share: the same over the entropy of the domains, 0 to 1.
    """
    if not counts or (entropy := domain_entropy_bits(counts[0])) == 0:
        return {}
    bits = float(np.mean([mutual_information_bits(layer) for layer in counts]))
    return {"eval/expert_domain_mi": bits, "eval/expert_domain_mi_share": bits / entropy}


def _shares(table: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return p(e | g) for domains with assignments."""
    table = table[table.sum(axis=1) > 0]
    return table / table.sum(axis=1, keepdims=True)
