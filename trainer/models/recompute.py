"""Recomputation of parts of a block: what they compute on the way is computed again in the backward pass.

Known as activation checkpointing (arXiv 1604.06174). Routers and exchanges are never part of it: nothing is sent twice,
and no choice between experts is made twice.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint


def checkpointed(function: Callable[..., Any], *args: Any, recompute: bool) -> Any:
    """Call a function; if `recompute`, save only its arguments for the backward pass.

    It is then called again there, under the same autocast, up to the last operation that saves something. It must do
    the same both times: no noise, and no effect on anything else. A compiler decides by itself what to save.
    """
    if not recompute or torch.compiler.is_compiling():
        return function(*args)
    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
