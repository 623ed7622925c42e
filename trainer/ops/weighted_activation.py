"""The activation between an expert's two products, times the combine weight of each row, forward and backward.

# n rows, F d_ff, H width before the activation (2 F with a gate, which comes first).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.ops.activations import Activation, ClampedSwiGLU
from trainer.ops.expert_ffn import activate


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightedActivation:
    """Activation function a = scale * act(h), forward and backward."""

    activation: Activation
    apply: Callable[[Tensor, Tensor, Activation], Tensor]
    """h (n, H), scale (n,) -> (n, F)."""
    gradients: Callable[[Tensor, Tensor, Tensor, Activation], tuple[Tensor, Tensor, Tensor]]
    """Gradient (n, F) of a, h (n, H), scale (n,) -> a (n, F), gradients of h (n, H) and of scale (n,).

    May overwrite the gradient of a.
    """


@cache
def weighted_activation(activation: Activation, *, is_compiled: bool) -> WeightedActivation:
    """Return the activation, compiled once for all layers and sizes if `is_compiled`."""
    apply, gradients = _apply, _gradients
    if is_compiled:  # one pass over the rows instead of one per operation
        apply = torch.compile(_apply, dynamic=True)
        gradients = torch.compile(_gradients_to_compile, dynamic=True)
    return WeightedActivation(activation=activation, apply=apply, gradients=gradients)


def _apply(h: Tensor, scale: Tensor, activation: Activation) -> Tensor:
    return activate(h, activation).mul_(scale[:, None])


def _gradients(da: Tensor, h: Tensor, scale: Tensor, activation: Activation) -> tuple[Tensor, Tensor, Tensor]:
    if isinstance(activation, ClampedSwiGLU):
        return _clamped_gradients(da, h, scale, activation)
    factor = scale[:, None]
    if activation == "gelu":
        a = F.gelu(h)
        d_scale = (da * a).sum(-1, dtype=scale.dtype)
        return a.mul_(factor), torch.ops.aten.gelu_backward(da.mul_(factor), h), d_scale
    gate, up = h.chunk(2, dim=-1)
    silu = F.silu(gate)
    a = silu * up
    d_scale = (da * a).sum(-1, dtype=scale.dtype)
    da.mul_(factor)
    dh = torch.empty_like(h)
    d_gate, d_up = dh.chunk(2, dim=-1)
    torch.mul(da, silu, out=d_up)
    torch.ops.aten.silu_backward.grad_input(da.mul_(up), gate, grad_input=d_gate)
    return a.mul_(factor), dh, d_scale


def _gradients_to_compile(
    da: Tensor, h: Tensor, scale: Tensor, activation: Activation
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the same, sharing one exponential: slower in eager mode, twice as fast compiled."""
    if isinstance(activation, ClampedSwiGLU):
        return _clamped_gradients(da, h, scale, activation)
    wide = torch.promote_types(h.dtype, torch.float32)
    da, wide_h, factor = da.to(wide), h.to(wide), scale.to(wide)[:, None]
    if activation == "gelu":
        unweighted = F.gelu(wide_h)
        dh = torch.ops.aten.gelu_backward(da * factor, wide_h)
    else:
        gate, up = wide_h.chunk(2, dim=-1)
        sigmoid = torch.sigmoid(gate)
        unweighted = gate * sigmoid * up
        slope = da * factor * sigmoid
        dh = torch.cat([slope * up * (1 + gate * (1 - sigmoid)), slope * gate], dim=-1)
    d_scale = (da * unweighted).sum(-1)
    return (unweighted * factor).to(h.dtype), dh.to(h.dtype), d_scale.to(scale.dtype)


def _clamped_gradients(
    da: Tensor, h: Tensor, scale: Tensor, activation: ClampedSwiGLU
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the same for a clamped gate; where a value is clamped it has no gradient, as `torch.clamp` has it."""
    wide, alpha, limit = torch.promote_types(h.dtype, torch.float32), activation.alpha, activation.limit
    gate, up = h.to(wide).chunk(2, dim=-1)
    gate_gets_gradient, up_gets_gradient = gate <= limit, up.abs() <= limit
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit) + 1
    sigmoid = torch.sigmoid(alpha * gate)
    glu = gate * sigmoid
    a, da = up * glu, da.to(wide)
    d_scale = (da * a).sum(-1)
    slope = da * scale.to(wide)[:, None]
    d_gate = slope * up * (sigmoid + alpha * glu * (1 - sigmoid)) * gate_gets_gradient
    dh = torch.cat([d_gate, slope * glu * up_gets_gradient], dim=-1)
    return (a * scale.to(wide)[:, None]).to(h.dtype), dh.to(h.dtype), d_scale.to(scale.dtype)
