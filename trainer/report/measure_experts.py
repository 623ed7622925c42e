"""Compare the experts of a layer: by their weights and by their outputs on the same tokens.

# E experts, T tokens, D d_model.
"""

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from trainer.convert.layer_traces import LayerTrace
from trainer.convert.merge_experts import output_similarity
from trainer.moe.experts import Experts
from trainer.report.report_data import DuplicateExperts

DUPLICATE = 0.95
"""Cosine from which on two experts compute nearly the same."""


@torch.no_grad()
def weight_similarity(experts: Experts) -> NDArray[np.float64]:
    """Return (E, E) the cosine of two experts' weights, adapters included, biases left out.

    Hidden units are compared in the order in which they are stored, so that experts that are copies of each other but
    for this order have a cosine near 0: their outputs tell.
    """
    products = torch.zeros(experts.num_experts, experts.num_experts, dtype=torch.float64)
    for name in ("w_in", "w_out"):
        products += _products(experts, name)
    length = products.diagonal().sqrt().clamp(min=1e-300)
    return (products / length[:, None] / length[None]).numpy()


def _products(experts: Experts, name: str) -> Tensor:
    """Return (E, E) the inner products of one matrix of all experts, an expert after another: never a copy of all."""
    weight = getattr(experts, name).detach()
    a, b = (getattr(experts, f"{name}_lora_{factor}", None) for factor in "ab")

    def of(expert: int) -> Tensor:
        matrix = weight[expert].double()
        if a is not None and b is not None:
            matrix = matrix + experts.lora_scales[name] * (b[expert].double() @ a[expert].double())
        return matrix.flatten().cpu()

    rows = []
    for expert in range(experts.num_experts):
        mine = of(expert)
        rows.append(torch.stack([mine @ of(other) for other in range(expert + 1)]))
    lower = torch.stack([F.pad(row, (0, experts.num_experts - len(row))) for row in rows])
    return lower + lower.tril(-1).mT


def compared_outputs(x: Tensor, experts: Experts) -> NDArray[np.float64]:
    """Return (E, E) the mean cosine of two experts' outputs on tokens x (T, D), without combine weights."""
    empty = x.new_zeros(0)
    return output_similarity(LayerTrace(x=x, weight=empty, counts=empty), experts).cpu().double().numpy()


def duplicates(weights: NDArray[np.float64], outputs: NDArray[np.float64] | None) -> tuple[DuplicateExperts, ...]:
    """Return the pairs whose weights or outputs have a cosine of at least `DUPLICATE`, the most alike first."""
    alike = weights if outputs is None else np.maximum(weights, outputs)
    pairs = np.argwhere(np.triu(alike >= DUPLICATE, k=1)).tolist()
    pairs.sort(key=lambda pair: -alike[pair[0], pair[1]])
    return tuple(
        DuplicateExperts(
            first=a, second=b, weights=float(weights[a, b]), outputs=None if outputs is None else float(outputs[a, b])
        )
        for a, b in pairs
    )
