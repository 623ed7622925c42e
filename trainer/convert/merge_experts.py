"""Merge experts whose outputs on a text are alike.

# E experts, T tokens, F hidden units.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.convert.hidden_units import HiddenUnits, mean_of_networks
from trainer.convert.layer_traces import LayerTrace
from trainer.moe.experts import Experts
from trainer.packages import importing


@dataclass(frozen=True, slots=True, kw_only=True)
class MergedGroup:
    """Experts that become one."""

    experts: Sequence[int]
    """The one that is used most is first: the others' units are aligned with its, and its router row stays."""
    weights: Sequence[float]
    """Share of each in the mean: that of its assignments."""


@torch.no_grad()
def output_similarity(trace: LayerTrace, experts: Experts) -> Tensor:
    """Return (E, E): the mean cosine between the outputs of two experts on the same tokens."""
    total = torch.zeros(experts.num_experts, experts.num_experts, dtype=torch.float64, device=trace.x.device)
    for _, outputs in trace.outputs(experts):
        unit = F.normalize(outputs, dim=-1)  # (E, t, D)
        total += torch.einsum("etd,ftd->ef", unit, unit)
    return total / len(trace.x)


def similar_groups(similarity: Tensor, shares: Tensor, *, keep: int, num_groups: int) -> list[MergedGroup]:
    """Group experts by average linkage until `keep` are left, as many in each of the router's groups.

    Source: HC-SMoE (Chen et al. 2024, arXiv 2410.08589), where the mean is weighted by the number of tokens as in
        M-SMoE (Li et al. 2023, arXiv 2310.01334).
    """
    size, found = len(similarity) // num_groups, []
    for start in range(0, len(similarity), size):
        clusters = [[e] for e in range(start, start + size)]
        while len(clusters) > keep // num_groups:
            pairs = [(a, b) for b in range(len(clusters)) for a in range(b)]
            a, b = max(pairs, key=lambda ab: float(similarity[clusters[ab[0]]][:, clusters[ab[1]]].mean()))
            clusters[a] += clusters.pop(b)
        found += [_group(sorted(cluster), shares) for cluster in clusters]
    return found


def _group(experts: list[int], shares: Tensor) -> MergedGroup:
    ordered = sorted(experts, key=lambda e: (-float(shares[e]), e))
    total = sum(float(shares[e]) for e in ordered)
    weights = [float(shares[e]) / total if total else 1 / len(ordered) for e in ordered]
    return MergedGroup(experts=ordered, weights=weights)


def merged_expert(experts: Experts, group: MergedGroup) -> HiddenUnits:
    """Return the weighted mean of a group's experts, with the hidden units of all in the order of the first one's."""
    first, *others = [HiddenUnits.of_expert(experts, e) for e in group.experts]
    return mean_of_networks([first, *(aligned(other, first) for other in others)], group.weights)


def aligned(network: HiddenUnits, reference: HiddenUnits) -> HiddenUnits:
    """Return the same network with its hidden units permuted so that their weights are nearest to the reference's.

    Source: weight matching of Git Re-Basin (Ainsworth et al. 2022, arXiv 2209.04836), exact for one hidden layer.
    """
    with importing("scipy", user="surgery merge"):
        from scipy.optimize import linear_sum_assignment

    products = reference.features().double() @ network.features().double().T  # (F, F)
    _, units = linear_sum_assignment(products.cpu().numpy(), maximize=True)
    return network.take(torch.from_numpy(units))
