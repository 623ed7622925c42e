"""The experts' feed-forward networks in plain autograd: the references for all kernels.

# N tokens, k slots per token, R rows, E experts, D d_model, F d_ff, H width before the activation.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.ops.activations import Activation, ClampedSwiGLU


class ExpertBiases(NamedTuple):
    """Biases of the experts' two products."""

    w_in: Tensor
    """(E, H), added to the hidden values."""
    w_out: Tensor
    """(E, D), added to the outputs, before the combine weight."""


def activate(h: Tensor, activation: Activation) -> Tensor:
    """Apply the activation function: (..., H) -> (..., F). SwiGLU: Shazeer 2020, arXiv 2002.05202."""
    if activation == "gelu":
        return F.gelu(h)
    gate, up = h.chunk(2, dim=-1)
    if isinstance(activation, ClampedSwiGLU):
        wide = torch.promote_types(h.dtype, torch.float32)  # rounded once, as the others are
        gate = gate.to(wide).clamp(max=activation.limit)
        up = up.to(wide).clamp(-activation.limit, activation.limit)
        return ((up + 1) * gate * torch.sigmoid(activation.alpha * gate)).to(h.dtype)
    return F.silu(gate) * up


def loop_ffn(x: Tensor, rows_per_expert: Tensor, w_in: Tensor, w_out: Tensor, activation: Activation) -> Tensor:
    """Apply one expert after the other.

    A kernel that is a plug-in takes the same arguments.

    Args:
        x: (R, D) rows grouped by expert, ascending.
        rows_per_expert: (E,) int64, sums to R.
        w_in: (E, H, D); H = 2 F (gate first, then up), or F for gelu; cast to the dtype of x.
        w_out: (E, D, F).
        activation: between the two products.

    Returns:
        (R, D) in x's dtype.
    """
    w_in, w_out = w_in.to(x.dtype), w_out.to(x.dtype)
    groups = x.split(rows_per_expert.tolist())  # waits for the device: sizes become shapes
    return torch.cat([activate(rows @ w_in[e].T, activation) @ w_out[e].T for e, rows in enumerate(groups)])


def reference_ffn(
    x: Tensor,
    expert_index: Tensor,
    weight: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    activation: Activation,
    biases: ExpertBiases | None = None,
) -> Tensor:
    """Return for each token of x (N, D) the weighted sum of its experts' outputs, by loops over slots and experts.

    Written from the formula: without an order of rows, and with the weight (N, k) after the second product.
    `expert_index` (N, k) is E or more for none.
    """
    out = x.new_zeros(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype))
    for slot in range(weight.shape[1]):
        for e in range(len(w_in)):
            mine = (expert_index[:, slot] == e).nonzero()[:, 0]
            h = x[mine] @ w_in[e].to(x.dtype).T
            h = h if biases is None else h + biases.w_in[e].to(x.dtype)
            y = activate(h, activation) @ w_out[e].to(x.dtype).T
            y = y if biases is None else y + biases.w_out[e].to(x.dtype)
            out = out.index_add(0, mine, y * weight[mine, slot, None])
    return out
