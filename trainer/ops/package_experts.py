"""The experts by the kernels of two other packages, which have their own autograd nodes: sonicmoe and scattermoe.

They take tokens and slots instead of rows, and save what they like. Both are for GPUs and bfloat16. Weights are rounded
and laid out anew in each forward pass, which gives the masters gradients in their own dtype.

# N tokens, k slots per token, R rows, E experts, D d_model, F d_ff, H width before the activation (2 F for swiglu).
"""

from collections.abc import Callable, Mapping
from typing import Final

import torch
from torch import Tensor

from trainer import packages
from trainer.ops.activations import Activation
from trainer.ops.expert_ffn import activate
from trainer.ops.expert_order import ExpertOrder

PackageExperts = Callable[[Tensor, Tensor, Tensor, ExpertOrder, Tensor, Tensor, Activation], Tensor]
"""(x, expert_index, weight, order of at least one row, w_in, w_out, activation) -> (N, D)."""


def sonicmoe_experts(
    x: Tensor,
    expert_index: Tensor,
    weight: Tensor,
    order: ExpertOrder,
    w_in: Tensor,
    w_out: Tensor,
    activation: Activation,
) -> Tensor:
    """Compute by `moe_general_routing_inputs`, for swiglu: (N, D) in the dtype of x.

    It wants assignments in the order of tokens, and weights as (2 F, D, E), gate and up by turns, and (D, F, E), with
    experts outermost in memory.

    Source: SonicMoE (arXiv 2512.14080), package sonic-moe 0.1.2.
    """
    if activation != "swiglu":
        raise ValueError(f"the experts' kernel sonicmoe has swiglu, not {activation}; use loop")
    with packages.importing("sonicmoe", user="sonicmoe"):
        # pyrefly: ignore[missing-import]
        from sonicmoe import moe_general_routing_inputs

        # pyrefly: ignore[missing-import]
        from sonicmoe.enums import ActivationType
    slot = order.slot_of_row.sort().values
    by_turns = w_in.unflatten(1, (2, -1)).transpose(1, 2)  # (E, F, 2, D)
    stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
    y, _ = moe_general_routing_inputs(
        x,
        weight.flatten().index_select(0, slot),
        (slot // weight.shape[1]).int(),
        expert_index.flatten().index_select(0, slot).int(),
        by_turns.to(x.dtype).contiguous().flatten(1, 2).permute(1, 2, 0),
        None,
        w_out.to(x.dtype).contiguous().permute(1, 2, 0),
        None,
        len(w_in),
        stream,
        ActivationType.SWIGLU,
        False,
    )
    return y


def scattermoe_experts(
    x: Tensor,
    expert_index: Tensor,
    weight: Tensor,
    order: ExpertOrder,
    w_in: Tensor,
    w_out: Tensor,
    activation: Activation,
) -> Tensor:
    """Compute by two calls of `parallel_linear`: (N, D) in the wider dtype of x and weight.

    It has a row for every slot: those of no expert come last, and are zeros. The combine weight comes before the second
    product, as in the project's own kernels, so that no expert's output is saved.

    Source: ScatterMoE (arXiv 2403.08245), package scattermoe 0.3.0.
    """
    with packages.importing("scattermoe", user="scattermoe"):
        # pyrefly: ignore[missing-import]
        from scattermoe.parallel_experts import parallel_linear
    expert, slot = expert_index.flatten().clamp(max=len(w_in)).sort(stable=True)
    ends = order.rows_per_expert.cumsum(0)
    h = parallel_linear(x, w_in.to(x.dtype).mT, weight.shape[1], expert, slot, ends, grouped_out=True)  # (N * k, H)
    scale = weight.flatten().index_select(0, slot)
    a = (activate(h, activation) * scale[:, None]).to(x.dtype)
    y = parallel_linear(a, w_out.to(x.dtype).mT, 1, expert, slot, ends, grouped_in=True)  # (N * k, D) by slot
    return y.view(*weight.shape, -1).sum(1, dtype=torch.promote_types(x.dtype, weight.dtype))


PACKAGE_EXPERTS: Final[Mapping[str, PackageExperts]] = {
    "sonicmoe": sonicmoe_experts,
    "scattermoe": scattermoe_experts,
}
