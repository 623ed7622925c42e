"""Outputs and gradients of an experts' layer, and where they differ from those of the oracle by more than rounding.

# N tokens, A combine weights, E experts, D d_model, F d_ff, H width before the activation, r rank.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_ROUNDINGS = 8
"""Roundings on the longest way from an input to a gradient: h, the activation's two factors, their product and the
weighted one on the way forth; dA, dH and the gradient of the weights on the way back."""


class LayerResult(NamedTuple):
    """Outputs of an experts' layer, and the gradients of its inputs."""

    y: Tensor
    """(N, D)."""
    x_grad: Tensor
    """(N, D)."""
    weight_grad: Tensor
    """Gradient of the combine weights, in any shape of A entries."""
    w_in_grad: Tensor
    """(E, H, D)."""
    w_out_grad: Tensor
    """(E, D, F)."""
    w_in_bias_grad: Tensor | None = None
    """(E, H); None without biases."""
    w_out_bias_grad: Tensor | None = None
    """(E, D)."""
    w_in_a_grad: Tensor | None = None
    """(E, r, D); None without a low-rank addition to w_in."""
    w_in_b_grad: Tensor | None = None
    """(E, H, r)."""
    w_out_a_grad: Tensor | None = None
    """(E, r, F); None without a low-rank addition to w_out."""
    w_out_b_grad: Tensor | None = None
    """(E, D, r)."""


_PIECES = {"y": "token", "x_grad": "token", "weight_grad": ""}
"""What a result is of; the others are of experts."""
_SHOWN = {
    "y": "the output",
    "x_grad": "the gradient of x",
    "weight_grad": "the gradient of the combine weights",
    "w_in_grad": "the gradient of w_in",
    "w_out_grad": "the gradient of w_out",
    "w_in_bias_grad": "the gradient of the bias of w_in",
    "w_out_bias_grad": "the gradient of the bias of w_out",
    "w_in_a_grad": "the gradient of the LoRA factor A of w_in",
    "w_in_b_grad": "the gradient of the LoRA factor B of w_in",
    "w_out_a_grad": "the gradient of the LoRA factor A of w_out",
    "w_out_b_grad": "the gradient of the LoRA factor B of w_out",
}


def layer_result(y: Tensor, grad: Tensor, inputs: Sequence[Tensor | None]) -> LayerResult:
    """Return outputs y (N, D), and the gradients of the inputs given that of y.

    The inputs are x, combine weights, w_in, w_out, and None or a tensor for each of the others. One that y does not
    depend on, or that is frozen, has a gradient of zeros.
    """
    learning = [x for x in inputs if x is not None and x.requires_grad]
    grads: Sequence[Tensor | None] = [None] * len(learning)
    if y.requires_grad:
        product = (y * grad.to(y.dtype)).sum()  # given as grad_outputs, it would import SymPy, which takes a second
        grads = torch.autograd.grad(product, learning, allow_unused=True)
    found = {id(x): g for x, g in zip(learning, grads, strict=True)}

    def gradient(x: Tensor | None) -> Tensor | None:
        known = found.get(id(x))
        return torch.zeros_like(x) if known is None and x is not None else known

    return LayerResult(y.detach(), *(gradient(x) for x in inputs))  # pyrefly: ignore[bad-argument-type]


def rounding_tolerance(dtype: torch.dtype, longest_sum: int) -> float:
    """Return the relative error that rounding alone may cause in a piece of a result.

    With u the unit roundoff, half of epsilon: every value on the longest way is rounded once to `dtype`, and each
    product accumulates at most n = `longest_sum` terms in at least float32. Errors of independent terms grow with the
    square root of their number, and a product of random matrices keeps relative norms, so after r roundings the norm
    of the error is below r (u(dtype) + sqrt(n) u(accumulator)) times the norm of the result. Measured, it is a tenth
    to a half of that.
    A group of n rows that loses one of them is off by sqrt(1 / n), 0.09 for 136; bfloat16 allows 0.03.
    """
    wide = torch.promote_types(dtype, torch.float32)
    units = torch.finfo(dtype).eps + math.sqrt(longest_sum) * torch.finfo(wide).eps
    return _ROUNDINGS * units / 2


def first_difference(found: LayerResult, expected: LayerResult, tolerance: float) -> str | None:
    """Return in words the first result that is off by more than `tolerance`; None if none is.

    Each token's output, and each expert's gradient, is compared by norm with its own oracle. What is exactly 0 there,
    such as the gradient of an expert without rows, must be exactly 0.
    """
    for name in LayerResult._fields:
        one, other, piece = getattr(found, name), getattr(expected, name), _PIECES.get(name, "expert")
        if other is None:
            continue
        if one.shape != other.shape:
            return f"{_SHOWN[name]} has shape {tuple(one.shape)}, not {tuple(other.shape)}"
        one, other = one.to(other), other
        if not piece:  # used weights are one piece: a single one can be near 0 by chance
            is_used = other != 0
            one, other = (torch.stack([x * is_used, x * ~is_used]) for x in (one, other))
        if (fault := _worst_piece(one.flatten(1), other.flatten(1), tolerance, piece)) is not None:
            return f"{_SHOWN[name]}{fault}"
    return None


def _worst_piece(found: Tensor, expected: Tensor, tolerance: float, piece: str) -> str | None:
    """Compare rows (n, width); return which one is the farthest off and how, if any is too far."""
    wide = torch.float64  # so that squares do not underflow
    error, size = (found - expected).norm(dim=1, dtype=wide), expected.norm(dim=1, dtype=wide)
    wrong = ~(error <= tolerance * size)  # also what is not a number
    if not wrong.any():
        return None
    worst = int(torch.where(wrong, error / size, -1).nan_to_num(nan=math.inf).argmax())
    where, others = (f" of {piece} {worst}", f" ({int(wrong.sum())} of {len(wrong)} {piece}s)") if piece else ("", "")
    if not bool(found[worst].isfinite().all()):
        return f"{where} is not finite{others}"
    if not size[worst]:
        return f"{where} is not 0, and nothing contributes to it{others}"
    return f"{where} is off by {float(error[worst] / size[worst]):.2g} of its size; rounding is {tolerance:.1g}{others}"
