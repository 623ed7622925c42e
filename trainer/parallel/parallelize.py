"""Apply a layout to a model: dispatchers, local experts, compilation, initial weights, sharding."""

from collections.abc import Iterable, Mapping
from typing import Literal, cast

import torch
from torch import nn

from trainer.config.build_plugin import build_plugin
from trainer.distributed.mesh import Mesh
from trainer.distributed.sharded_tensor import is_sharded
from trainer.errors import ConfigError
from trainer.models.block import Block
from trainer.models.gpt import GPT
from trainer.models.initialize import WeightShard, initialize
from trainer.moe.dispatch.base import Dispatcher
from trainer.moe.dispatch.expert_copies import ExpertCopies
from trainer.moe.expert_places import ExpertPlaces
from trainer.moe.layer import MoE
from trainer.ops.attention import blocked_attention, torch_attention
from trainer.ops.block_attention import flex, suits_blocks
from trainer.parallel.compile_glue import compile_glue, compile_kernel
from trainer.parallel.config import ParallelConfig
from trainer.parallel.expert_placement import ExpertPlacement, named_placement
from trainer.parallel.pipeline_stages import pipeline_stages
from trainer.parallel.ring_attention import RingAttention
from trainer.parallel.shards import local, shard_index
from trainer.parallel.shared_rows import SharedRows
from trainer.parallel.stage_relay import StageRelay
from trainer.parallel.tensor_parallel import WholeRows, cut_matrices, cut_parameters
from trainer.parallel.ulysses import UlyssesAttention


def parallelize(
    model: GPT,
    config: ParallelConfig,
    mesh: Mesh,
    device: torch.device,
    *,
    seed: int | None,
    dtype: torch.dtype,
    can_compile: bool,
    placement: ExpertPlacement | None = None,
) -> GPT:
    """Apply a layout to a model on the meta device, in place; results change by floating-point reordering only.

    Without a `seed` the weights have no values.

    0. Layers of other stages of a pipeline are given up, and heads and hidden units of other tensor-parallel ranks.
    1. Every MoE layer gets the configured dispatcher and keeps its local experts: those of `placement`, or of the
       config's.
    2. The head is applied to some tokens at a time, some activations are recomputed, and the operations between matrix
       products are compiled, as far as configured and possible.
    3. Attention, capacities and routers that look ahead get to see rows that several ranks share.
    4. Weights are sharded over the ranks that would hold replicas, if configured.
    5. This rank's weights are allocated and initialized.
    """
    if mesh.pp.size > 1:
        stages, stream = pipeline_stages(model.config, model.vocab_size, mesh.layout), next(model.parameters()).dtype
        model.keep(stages.layers_of(mesh.pp.index))
        model.relay = StageRelay(stages, mesh.pp, width=model.config.d_model, dtype=stream)
    layers, num_copies = model.moe_layers(), 0
    if mesh.tp.size > 1:
        cut_matrices(model, mesh.tp)
    if mesh.ep.size > 1:
        sizes = len(model.config.moe_layers), layers[0].experts.num_experts, mesh.ep.size
        placement = placement or named_placement(config.placement, *sizes, num_copies=config.replicas)
        numbers = [number for number, layer in enumerate(model.config.moe_layers) if layer in model.blocks.numbers]
        _place_experts(dict(zip(numbers, layers, strict=True)), placement, mesh)
        num_copies = placement.num_copies
    for moe in layers:
        num_places = moe.experts.num_experts + num_copies * mesh.ep.size
        moe.dispatcher = build_plugin(config.dispatcher, Dispatcher, "parallel.dispatcher", mesh, num_places)
        moe.dispatcher.step_timer = mesh.world.recorder.step_timer
    model.loss_chunk, model.shard_keeps = config.loss_chunk, config.shard_keeps
    model.overlaps = config.overlaps
    for layer, block in model.blocks.numbered():
        block.set_recompute(config.recompute_of(layer))
    is_compiled = config.compile and can_compile
    choose_attention(model, device, dtype, is_compiled=is_compiled)
    if mesh.rows.size > 1:
        if is_compiled:
            compile_kernel(model)
        share_rows(model, mesh, kind=config.cp)
    if is_compiled:
        compile_glue(model)
    if config.data == "shard":
        from trainer.parallel.shard import shard  # which imports what takes half a second

        shard(model, mesh, dtype=dtype)
        model.to_empty(device=device)
    else:
        _allocate(model, device)
    if seed is None:
        return model
    cuts = {name: found.own for name, found in cut_parameters(model).items()}
    parts = {name: p for name, p in model.named_parameters() if name in cuts or is_sharded(p)}
    shards = {name: WeightShard(local(p), shard_index(p), cuts.get(name)) for name, p in parts.items()}
    initialize(model, seed, shards)
    return model


def _place_experts(layers: Mapping[int, MoE], placement: ExpertPlacement, mesh: Mesh) -> None:
    """Let every MoE layer keep the experts of this rank, number all by their places, and lend those with copies.

    `layers` are those that are here, by their number among all MoE layers.
    """
    ranks, me = range(mesh.ep.size), mesh.ep.index
    for layer, moe in layers.items():
        own, copies = placement.held(layer, me)
        moe.experts.keep(own)
        places = placement.places(layer)
        if places != [[expert] for expert in range(len(places))]:
            moe.places = ExpertPlaces(places, first_turn=me)
        if copies:
            lent = [[own.index(e) for e in placement.held(layer, rank)[1] if e in own] for rank in ranks]
            borrowed = [sum(placement.owners[layer][e] == rank for e in copies) for rank in ranks]
            moe.lend = ExpertCopies(mesh.ep, lent, borrowed).start


def _allocate(model: nn.Module, device: torch.device) -> None:
    """Allocate weights and buffers like `to_empty`, for which torch imports a library of algebra."""
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            values = torch.empty(p.shape, dtype=p.dtype, device=device)
            setattr(module, name, nn.Parameter(values, requires_grad=p.requires_grad))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype, device=device))


def choose_attention(model: GPT, device: torch.device, dtype: torch.dtype, *, is_compiled: bool) -> None:
    """Choose the kernel of attention, and the form of masks that it takes.

    Torch's fused kernels; flex_attention for what they have no kernel for: documents to keep apart, windows, sinks and
    capped scores. On the CPU the blocked implementation is faster once it is compiled.
    """
    attention = blocked_attention if is_compiled and device.type == "cpu" else torch_attention
    own = model.config.attention
    is_beyond_torch = model.config.document_mask or own.window is not None or own.changes_scores
    if is_beyond_torch and suits_blocks(device, dtype, min(model.config.head_widths)):
        attention, model.mask_form = flex, "blocks"
    for block in cast(Iterable[Block], model.blocks):
        block.attention.core_attention = attention


def share_rows(model: GPT, mesh: Mesh, *, kind: Literal["ulysses", "ring"]) -> None:
    """Let a model with a part of each row see all of it, where its kernels of attention are chosen."""
    key = "cp_size" if mesh.tp.size == 1 else "tp_size"
    for moe in model.moe_layers():
        router = type(moe.router)
        if moe.router.causal != "strict" and not router.sees_whole_rows:
            raise ConfigError(
                f"parallel.{key}: {router.__module__}:{router.__qualname__} is not strictly causal and does not "
                f"declare sees_whole_rows, so it would decide by a part of each row; use {key}: 1, or let it decide "
                "from RoutingContext.whole_rows and declare that"
            )
    model.row_parts, form = SharedRows(mesh.rows, mesh.cp), model.mask_form
    if kind == "ring" and mesh.cp.size > 1:
        model.mask_form = "rule"
    for block in cast(Iterable[Block], model.blocks):
        own = block.attention.core_attention
        if mesh.cp.size == 1:
            block.attention.core_attention = WholeRows(own)
        else:
            ring, heads = RingAttention(mesh.cp, own, form), UlyssesAttention(mesh.cp, own)
            block.attention.core_attention = ring if kind == "ring" else heads
