"""The only file where model meets machine: which dispatcher moves its rows, which of its parts are compiled."""

from collections.abc import Iterable
from typing import cast

import torch

from trainer.models.gpt import GPT, Block
from trainer.parallel.config import ParallelConfig


def parallelize(model: GPT, config: ParallelConfig, *, can_compile: bool) -> GPT:
    """Give a whole single-device model its layout; nothing it computes changes beyond floating-point reordering.

    1. Every MoE layer gets the configured dispatcher.
    2. The glue between the matrix products (norms, rotary positions, residual sums) is compiled,
       where asked for and possible.

    Args:
        model: may be on the meta device.
        config: the `parallel` section.
        can_compile: whether this machine can build compiled kernels.
    """
    for moe in model.moe_layers():
        moe.dispatcher = config.dispatcher.build()
    if config.compile and can_compile:
        compile_glue(model)
    return model


def compile_glue(model: GPT) -> None:
    """Compile what surrounds the matrix products: attention and its norms (fixed shapes), and the activation."""
    for block in cast(Iterable[Block], model.blocks):
        block.compiled_attend = torch.compile(block.attend, dynamic=False)
    for moe in model.moe_layers():
        moe.experts.is_compiled = True
