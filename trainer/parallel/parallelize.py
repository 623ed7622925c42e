"""The only place where model meets machine: what moves its rows, where its weights are, what of it is compiled."""

from collections.abc import Iterable
from typing import cast

import torch

from trainer.distributed.mesh import Mesh
from trainer.distributed.rank_layout import even_slice
from trainer.models.gpt import GPT, Block
from trainer.models.initialize import initialize
from trainer.ops.attention import blocked_attention
from trainer.parallel.config import ParallelConfig
from trainer.parallel.shard import shard


def parallelize(
    model: GPT,
    config: ParallelConfig,
    mesh: Mesh,
    device: torch.device,
    *,
    seed: int,
    dtype: torch.dtype,
    can_compile: bool,
) -> GPT:
    """Give a whole single-device model its layout; nothing it computes changes beyond floating-point reordering.

    1. Every MoE layer gets the configured dispatcher, and keeps this rank's part of its experts.
    2. What runs between the matrix products is compiled, where asked for and possible.
    3. Weights get memory and their initial values.
    4. They are cut over the ranks that would hold copies, where asked for.

    Args:
        model: on the meta device; its weights have no values yet.
        config: the `parallel` section.
        mesh: this rank's groups.
        device: where it will run.
        seed: of the initial values.
        dtype: of the matrix products.
        can_compile: whether this machine can build compiled kernels.
    """
    for moe in model.moe_layers():
        moe.dispatcher = config.dispatcher.build(mesh, moe.experts.num_experts)
        moe.dispatcher.step_timer = mesh.world.recorder.step_timer
        if mesh.ep.size > 1:
            moe.experts.keep(*even_slice(moe.experts.num_experts, mesh.ep.size, mesh.ep.index))
    if config.compile and can_compile:
        compile_glue(model, device)
    model.to_empty(device=device)
    initialize(model, seed)
    return shard(model, mesh, dtype=dtype) if config.data == "shard" else model


def compile_glue(model: GPT, device: torch.device) -> None:
    """Compile what surrounds the matrix products.

    For fixed shapes: norms, attention and losses. For any number of rows: the experts' activation and the combine.
    """
    for block in cast(Iterable[Block], model.blocks):
        if device.type == "cpu":
            block.attention.core_attention = blocked_attention
        block.compiled_attend = torch.compile(block.attend, dynamic=False)
    model.compiled_losses = torch.compile(model.losses, dynamic=False)
    for moe in model.moe_layers():
        moe.dispatcher.is_compiled = moe.experts.is_compiled = True
