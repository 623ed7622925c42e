"""Shard weights, gradients and optimizer state over the ranks that would hold replicas (FSDP2, arXiv 2304.11277).

    group                        gathered                               in bfloat16 training
    matrices of a block          before the block, freed after it       bfloat16
    those that are cut over tp   before attention or feed-forward       bfloat16
    experts of a MoE layer       before the layer, freed after it       bfloat16
    all the rest of the model    once a step: it is used everywhere     float32

Gradients are reduce-scattered as a sum in float32 (float64 if the weights are): FSDP's division by the number of ranks
is disabled. Embedding and head are gathered in float32, although a product rounds them: nothing rounds an embedding
that is looked up, and the head's gradient is summed over chunks of tokens in float32, which the gradient of a bfloat16
weight could not hold, so sharding would change what is learned. A group has one dtype, since a reduction has: norms and
routers, which stay in float32, would need a third group in every block, and are small enough to stay whole during a
step.

# D d_model, H width of the experts before their activation.
"""

import itertools
import warnings
from collections.abc import Iterable, Set
from typing import cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import Shard

from trainer.distributed.mesh import Mesh
from trainer.models.block import Block
from trainer.models.gpt import GPT
from trainer.models.parameter_roles import parameter_role
from trainer.parallel.tensor_parallel import cut_parameters


def shard(model: GPT, mesh: Mesh, *, dtype: torch.dtype) -> GPT:
    """Shard the weights of a model, in place; on the meta device they get no memory.

    Dense weights are sharded over `mesh.shard`, experts over `mesh.edp_shard`, what tensor-parallel ranks cut over
    `mesh.tdp_shard`, or not at all if that is one rank.

    Args:
        model: with the local experts.
        mesh: this rank's groups.
        dtype: of the matrix products. Under bfloat16 the matrices of blocks and experts are gathered in it, since
            autocast and the experts' kernels round them, and the gradient of each micro-batch, to the same values.
    """
    if mesh.stage.size == 1:
        return model
    dense_mesh, low = mesh.shard.device_mesh(mesh.shard_copies), dtype if dtype is torch.bfloat16 else None
    in_blocks = {p for name, p in model.named_parameters() if parameter_role(name) in ("matrix", "expert")}
    parameters, of_cuts = dict(model.named_parameters()), cut_parameters(model)
    cut = {parameters[name] for name in of_cuts}
    # From the outside in, so that norms and routers inside the blocks are left to the model's group.
    _shard_parameters(model, set(model.parameters()) - in_blocks, dense_mesh)
    for block in cast(Iterable[Block], model.blocks):
        matrices = {p for name, p in block.named_parameters() if parameter_role(name) == "matrix"} - cut
        _shard_parameters(block, matrices, dense_mesh, gathered_in=low)
    if mesh.tdp_shard.size > 1:
        cut_mesh = mesh.tdp_shard.device_mesh(mesh.tdp_shard_copies)
        for name in dict.fromkeys(found.module for found in of_cuts.values()):
            module = model.get_submodule(name)
            _shard_parameters(module, cut & set(module.parameters()), cut_mesh, gathered_in=low)
    if mesh.edp_shard.size > 1:
        expert_mesh = mesh.edp_shard.device_mesh(mesh.edp_shard_copies)
        for moe in model.moe_layers():
            # Around the whole layer: experts that run in several chunks are gathered once, while tokens are routed.
            _shard_parameters(moe, set(moe.experts.parameters()), expert_mesh, gathered_in=low, inside=True)
    if dense_mesh.device_type != "cpu":  # where a gather takes no time from what is computed meanwhile
        gather_ahead(model)
    # It warns of what nothing here does: to change in place what a layer returns.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view", category=UserWarning)
    for method in ("next_logits", "target_log_probs", "overlapped"):
        register_fsdp_forward_method(model, method)
    for block in cast(Iterable[Block], model.blocks):
        register_fsdp_forward_method(block, "overlapped")
    for moe in model.moe_layers():
        register_fsdp_forward_method(moe, "compute")
    return model


def gather_ahead(model: GPT) -> None:
    """Let each group's gather start when the group before it starts to compute: a layer's experts with its block.

    By itself FSDP starts it when the host gets there, and the host waits for the sizes of messages in every MoE layer.
    """
    groups = [m for m in model.modules() if isinstance(m, FSDPModule)]  # the model's; each block's, then its experts'
    for group, following in itertools.pairwise(groups):
        group.set_modules_to_forward_prefetch([following])


def _dimension(weight: nn.Parameter, num_ranks: int) -> int:
    """Return the dimension along which a weight of experts is sharded: their number, or one inside if they are too few.

    16 experts over 64 ranks would leave 48 ranks empty, and every gather would send four times as many bytes. Inside,
    a dimension has to be divided evenly.
    """
    return next((dim for dim, size in enumerate(weight.shape) if size % num_ranks == 0), 0)


def _shard_parameters(
    module: nn.Module,
    parameters: Set[nn.Parameter],
    mesh: DeviceMesh,
    *,
    gathered_in: torch.dtype | None = None,
    inside: bool = False,
) -> None:
    """Shard some parameters of a module as one group; the others stay as they are.

    Along dimension 0; if `inside` is true, along another one where that is not divided evenly.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=gathered_in,
        reduce_dtype=None if gathered_in is None else torch.float32,
        cast_forward_inputs=False,  # autocast does
    )
    fully_shard(
        module,
        mesh=mesh,
        ignored_params=set(module.parameters()) - parameters,
        mp_policy=policy,
        shard_placement_fn=lambda weight: Shard(_dimension(weight, mesh.size(-1)) if inside else 0),
    )
    sharded = cast(FSDPModule, module)
    sharded.set_gradient_divide_factor(1.0)
    sharded.set_force_sum_reduction_for_comms(True)  # otherwise it needs a reduction that gloo lacks
