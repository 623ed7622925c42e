"""Shard weights, gradients and optimizer state over the ranks that would hold replicas (FSDP2, arXiv 2304.11277).

A weight is gathered before its block runs and freed after it (but under bfloat16 the rounded copies of experts stay
until their backward pass, as those of autocast do). Its gradient is reduce-scattered as a sum: FSDP's division by the
number of ranks is disabled.
"""

from collections.abc import Iterable, Set
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from trainer.distributed.collectives import Group
from trainer.distributed.mesh import Mesh
from trainer.models.block import Block
from trainer.models.gpt import GPT
from trainer.models.parameter_roles import parameter_role


def shard(model: GPT, mesh: Mesh, *, dtype: torch.dtype) -> GPT:
    """Shard the weights of an initialized model, in place.

    Dense weights are sharded over all ranks, block by block; experts over the ranks of their replicas, or not at all if
    there is a single replica.

    Args:
        model: on its device.
        mesh: this rank's groups.
        dtype: of the matrix products. Under bfloat16 the matrices of dense blocks are gathered in it, since autocast
            would round them and their gradients to the same values. Norms, routers and embeddings keep their dtype,
            and so do experts, whose kernels write gradients in the dtype of the weights.
    """
    if mesh.world.size == 1:
        return model
    experts = [moe.experts for moe in model.moe_layers()]
    if mesh.edp.size > 1:
        for module in experts:
            _shard_module(module, mesh.edp)
    # FSDP skips weights that are already sharded; weights without replicas must be excluded explicitly.
    unreplicated = {p for module in experts for p in module.parameters()} if mesh.edp.size == 1 else set()
    for block in cast(Iterable[Block], model.blocks):
        if dtype is torch.bfloat16:
            linear = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
            matrices: list[nn.Module] = [m for n, m in linear.items() if parameter_role(f"{n}.weight") == "matrix"]
            _shard_module(matrices, mesh.world, gathered_in=dtype)
        _shard_module(block, mesh.world, ignored=unreplicated)
    _shard_module(model, mesh.world, ignored=unreplicated)
    for method in ("next_logits", "target_log_probs"):
        register_fsdp_forward_method(model, method)
    return model


def _shard_module(
    module: nn.Module | list[nn.Module],
    group: Group,
    *,
    ignored: Set[nn.Parameter] = frozenset(),
    gathered_in: torch.dtype | None = None,
) -> None:
    policy = MixedPrecisionPolicy(
        param_dtype=gathered_in,
        reduce_dtype=None if gathered_in is None else torch.float32,
        cast_forward_inputs=False,  # autocast does
    )
    fully_shard(module, mesh=group.device_mesh(), ignored_params=set(ignored), mp_policy=policy)
    for part in module if isinstance(module, list) else [module]:
        sharded = cast(FSDPModule, part)
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)  # otherwise it needs a reduction that gloo lacks


def is_sharded(tensor: Tensor) -> bool:
    """Return whether this rank holds only a shard of the tensor."""
    return isinstance(tensor, DTensor)


@torch.no_grad()
def local(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a tensor, sharing its memory; the tensor itself if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def first_row(tensor: Tensor) -> int:
    """Return the first index of this rank's shard along dimension 0; all shards but the last have equal length."""
    if not isinstance(tensor, DTensor):
        return 0
    length = -(-tensor.shape[0] // tensor.device_mesh.size())
    return min(tensor.shape[0], length * tensor.device_mesh.get_local_rank())
