"""Make a dense network of a MoE layer.

# T tokens, E experts, M of them kept, D d_model.
"""

from typing import Literal, cast

import torch
from torch import Tensor

from trainer.convert.hidden_units import HiddenUnits, sum_of_networks
from trainer.convert.layer_traces import LayerTrace
from trainer.models.feed_forward import FeedForward
from trainer.moe.layer import MoE

_RTOL = 1e-6  # experts that are nearly a combination of others, such as copies, share their factor


def dense_network(
    moe: MoE, trace: LayerTrace, *, num_experts: int, fit: Literal["least_squares", "mean_weight"]
) -> HiddenUnits:
    """Return one network: the shared experts, then `num_experts` experts in the order of their mean combine weight."""
    mean_weight = trace.weight.double().mean(0)  # (E,), with 0 where an expert is not visited
    kept = mean_weight.argsort(descending=True, stable=True)[:num_experts]
    factors = mean_weight[kept] * (mean_weight.sum() / mean_weight[kept].sum())
    if fit == "least_squares":
        factors = least_squares(moe, trace, kept)
    networks = [] if moe.shared is None else [HiddenUnits.of_layer(cast(FeedForward, moe.shared))]
    for e, factor in zip(kept.tolist(), factors.tolist(), strict=True):
        networks.append(HiddenUnits.of_expert(moe.experts, e).scaled(factor))
    return sum_of_networks(networks)


def least_squares(moe: MoE, trace: LayerTrace, kept: Tensor) -> Tensor:
    """Return (M,): the factors with which the kept experts' outputs come nearest to the output of all."""
    products = torch.zeros(len(kept), len(kept), dtype=torch.float64, device=trace.x.device)
    with_target = torch.zeros(len(kept), dtype=torch.float64, device=trace.x.device)
    for part, outputs in trace.outputs(moe.experts):
        outputs = outputs.double()  # (E, t, D)
        target = torch.einsum("te,etd->td", trace.weight[part].double(), outputs)
        mine = outputs[kept]
        products += torch.einsum("mtd,ntd->mn", mine, mine)
        with_target += torch.einsum("mtd,td->m", mine, target)
    return torch.linalg.pinv(products, rtol=_RTOL, hermitian=True) @ with_target
