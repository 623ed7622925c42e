"""Measure a MoE layer by counting: load, domains, which experts work together, and where tokens go next.

# N tokens, E experts, G domains, k experts of a token.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from trainer.report.report_data import LayerFlow, Matrix
from trainer.report.routed_text import NO_EXPERT, Choices, assignments


def as_matrix(values: NDArray[np.generic]) -> Matrix:
    """Return a two-dimensional array as a `Matrix`."""
    return tuple(tuple(float(value) for value in row) for row in values.tolist())


def domain_counts(
    choices: Choices, token_domain: NDArray[np.int64], *, num_domains: int, num_experts: int
) -> NDArray[np.int64]:
    """Return (G, E) assignments."""
    token, expert = assignments(choices)
    cells = token_domain[token] * num_experts + expert
    return np.bincount(cells, minlength=num_domains * num_experts).reshape(num_domains, num_experts)


def coactivation(choices: Choices, num_experts: int) -> NDArray[np.float64] | None:
    """Return (E, E) the share of the tokens of expert e that also chose f; None if no token has two experts."""
    if choices.shape[1] < 2 or not (choices[:, 1] != NO_EXPERT).any():
        return None
    pairs = _pairs(choices, choices, num_experts)
    return pairs / np.maximum(1, pairs.diagonal())[:, None]


def flow(layers: Sequence[int], choices: Sequence[Choices], num_experts: int) -> tuple[LayerFlow, ...]:
    """Return how tokens go from each MoE layer to the next; `layers` are the blocks' indices."""
    found = []
    for n in range(len(layers) - 1):
        pairs = _pairs(choices[n], choices[n + 1], num_experts)
        bits = joint_information_bits(pairs)
        found.append(
            LayerFlow(layer=layers[n], next_layer=layers[n + 1], counts=as_matrix(pairs), mutual_information=bits)
        )
    return tuple(found)


def joint_information_bits(counts: NDArray[np.int64]) -> float:
    """Return the mutual information of row and column of a table of counts, in bits."""
    if (total := counts.sum()) == 0:
        return 0.0
    joint = counts / total
    alone = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    some = joint > 0
    return max(0.0, float((joint[some] * np.log2(joint[some] / alone[some])).sum()))


def load_imbalance(load: NDArray[np.float64]) -> float:
    """Return the highest load (E,) over the mean; 0 if nothing was routed."""
    return float(load.max() / load.mean()) if load.sum() else 0.0


def saturation(choices: Choices, last: Choices, num_experts: int) -> float:
    """Return the share of the choices that the last checkpoint makes for the same token too; 0 without choices.

    Source: OLMoE (Muennighoff et al. 2024, arXiv 2409.02060), where k is fixed.
    """
    token, expert = assignments(choices)
    if not len(token):
        return 0.0
    token_last, expert_last = assignments(last)
    same = np.isin(token * num_experts + expert, token_last * num_experts + expert_last)
    return float(same.mean())


def _pairs(first: Choices, second: Choices, num_experts: int) -> NDArray[np.int64]:
    """Return (E, E) pairs of an expert of a token in one layer and one of the same token in another."""
    total = np.zeros(num_experts * num_experts, dtype=np.int64)
    for a in range(first.shape[1]):  # a pair of slots after another: k * k * N at once would be much
        for b in range(second.shape[1]):
            both = (first[:, a] != NO_EXPERT) & (second[:, b] != NO_EXPERT)
            cells = first[both, a].astype(np.int64) * num_experts + second[both, b]
            total += np.bincount(cells, minlength=num_experts * num_experts)
    return total.reshape(num_experts, num_experts)
