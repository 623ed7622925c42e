"""First derivatives only: a written backward pass that refuses to be differentiated again.

torch's own `once_differentiable` refuses only if the gradient that comes back has a graph. That of a plain sum has
none, and the second derivative would lack a part, in silence.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Gradients = Tensor | tuple[Tensor | None, ...]


def only_first_derivative(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
    """Let the `backward` of a torch.autograd.Function refuse `create_graph`.

    Raises:
        RuntimeError: by the gradients, if they are to be differentiated.
    """

    @functools.wraps(backward)
    def first_only(ctx: Any, *grads: Tensor | None) -> Gradients:
        # In a backward pass gradients are recorded by `create_graph` only. Compiled code refuses by itself.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                f"{backward.__qualname__.removeprefix('_')}: create_graph=True, but second derivatives are not "
                "available here; leave create_graph out"
            )
        return backward(ctx, *grads)

    return first_only
