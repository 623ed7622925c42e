"""Memory of a training run: refuse what cannot fit, and add advice to out-of-memory errors, by phase."""

from contextlib import AbstractContextManager
from typing import Literal

import torch

from trainer.console import formatting
from trainer.distributed.rank_layout import Layout
from trainer.engine.registry import NativeEngineConfig
from trainer.errors import ResourceError, explain_out_of_memory
from trainer.experiment import ExperimentConfig
from trainer.metrics.system_stats import total_memory
from trainer.models.freeze import freeze_parameters, frozen_names
from trainer.models.gpt import GPT
from trainer.models.initialize import expert_parameters
from trainer.models.parameter_roles import parameter_role

_MIN_VOCAB_SIZE = 256
"""Assumed where the vocabulary size is only known from a file."""
_WITH_GRADIENT_AND_MOMENTS = 4
"""Numbers for each weight that learns; a frozen one is alone."""
_BATCH_BYTES = 50
"""Bytes per position of a `Batch`: six int64 and two bool."""

Phase = Literal[
    "reading text",
    "making the weights",
    "making the optimizer state, two numbers per weight",
    "taking a step",
    "evaluating the model",
    "copying the state to save it",
    "reading a checkpoint",
]


def check_memory(config: ExperimentConfig, layout: Layout, device: torch.device) -> None:
    """Refuse a training run that cannot fit into this machine's memory, before allocating anything.

    Counts only what must be in memory at once: weights, gradients and moments, one micro-batch's activations (two under
    `parallel.overlap`), weights that copies of experts are sent and, on a CPU, the rows of a step. Of a pipeline's
    stages, some need at least the mean of all.

    Raises:
        ResourceError: with the largest part and the keys that lower it.
    """
    model, train, size = config.model, config.train, 8 if config.train.dtype == "float64" else 4
    rows_per_rank = -(-train.global_batch_size // layout.data_size)
    vocab_size = getattr(config.data.tokenizer, "vocab_size", _MIN_VOCAB_SIZE)
    weights = model.weights(vocab_size=vocab_size)
    local_experts = 0 if model.moe is None else model.moe.num_experts // layout.ep_size
    is_native, is_sharded = isinstance(config.engine, NativeEngineConfig), config.parallel.data == "shard"
    copies = _WITH_GRADIENT_AND_MOMENTS if is_native else 1  # DeepSpeed shards the moments, but no weights
    copies += train.ema is not None  # of the weights that learn
    frozen = _frozen(config, vocab_size)
    dense, experts = (
        copies * whole - (copies - 1) * still
        for whole, still in zip((weights.dense, weights.expert), frozen, strict=True)
    )
    cut = dense * model.cut_weights // weights.dense if layout.tp_size > 1 else 0  # as if equally much of it is frozen
    dense, cut, experts = dense - cut, cut // layout.tp_size, experts * local_experts
    if is_sharded:
        dense, experts = dense // layout.num_shards, experts // layout.num_expert_shards
        cut //= layout.num_cut_shards
    state = size * (dense + cut + experts)
    num_rows = min(config.parallel.micro_batch_size * config.parallel.at_once, rows_per_rank)
    chunk = config.parallel.loss_chunk
    values = model.activations(vocab_size=vocab_size, num_rows=num_rows, loss_chunk=chunk)
    activations = size // 2 * values // layout.row_size  # may be bfloat16
    replicas = size // 2 * weights.expert * (config.parallel.replicas if layout.ep_size > 1 else 0)
    state, activations, replicas = (part // layout.pp_size for part in (state, activations, replicas))
    batch = _BATCH_BYTES * rows_per_rank * model.seq_len // layout.row_size if device.type == "cpu" else 0
    local_ranks = layout.ranks_per_node if device.type == "cpu" else 1
    needed, available = local_ranks * (state + activations + replicas + batch), total_memory(device)
    if needed <= available:
        return
    parts = {
        "weights with gradients and moments" if is_native else "weights": (
            state,
            "model.d_model, model.num_layers or the experts, or share these among more ranks (parallel.ep_size)",
        ),
        "activations of one micro-batch": (activations, "parallel.micro_batch_size or model.seq_len"),
        "weights of copies of experts": (replicas, "parallel.replicas"),
        "rows of one step": (batch, "train.global_batch_size or model.seq_len"),
    }
    part, (part_size, advice) = max(parts.items(), key=lambda item: item[1][0])
    subject = f"{local_ranks} ranks on this machine need" if local_ranks > 1 else "needs"
    raise ResourceError(
        f"{config.name}: {subject} at least {formatting.size(needed)} of memory "
        f"({formatting.size(local_ranks * part_size)} for {part}), and {formatting.size(available)} is available; "
        f"lower {advice}"
    )


def _frozen(config: ExperimentConfig, vocab_size: int) -> tuple[int, int]:
    """Return how many weights of the dense part, without routers, and of one expert in all layers are frozen."""
    if not config.train.freeze and config.model.lora is None:
        return 0, 0
    with torch.device("meta"):
        model = GPT(config.model, vocab_size)
    freeze_parameters(model, frozen_names(model, config.train.freeze))
    experts, parameters = expert_parameters(model), dict(model.named_parameters())
    frozen = [name for name, p in parameters.items() if not p.requires_grad and parameter_role(name) != "router"]
    sizes = {name: parameters[name].numel() for name in frozen}
    of_experts = sum(size for name, size in sizes.items() if name in experts)
    num_experts = 1 if config.model.moe is None else config.model.moe.num_experts
    return sum(sizes.values()) - of_experts, of_experts // num_experts


def hint(config: ExperimentConfig, phase: Phase, *, note: str = "") -> AbstractContextManager[None]:
    """Add advice to an out-of-memory error of a phase; the note is put after the phase's name."""
    match phase:
        case "reading text":  # in worker processes
            advice = "lower data.workers, each of which holds a part of it"
        case "making the weights":  # all but the experts of other ranks
            advice = _smaller_model(config)
        case "making the optimizer state, two numbers per weight":
            sharding = "" if config.parallel.data == "shard" else "shard it over more ranks (parallel.data: shard), or "
            advice = sharding + _smaller_model(config)
        case "taking a step":
            advice = _smaller_batch(config, can_recompute=config.parallel.recompute != "block")
        case "evaluating the model":  # in micro-batches too
            advice = _smaller_batch(config)
        case "copying the state to save it":
            no_copy = "set checkpoint.asynchronous: false, which makes no copy of it"
            advice = no_copy if config.checkpoint.asynchronous else _smaller_model(config)
        case "reading a checkpoint":  # one tensor at a time
            key = " (parallel.ep_size)" if config.model.moe is not None else ""
            advice = f"use more ranks{key}, or a machine with more memory"
    return explain_out_of_memory(f"{phase}{note}", advice)


def _smaller_batch(config: ExperimentConfig, *, can_recompute: bool = False) -> str:
    rows, again = config.parallel.micro_batch_size, "set parallel.recompute: block"
    if rows > 1:
        return f"lower parallel.micro_batch_size, which is {rows}" + (f", or {again}" if can_recompute else "")
    first = f"{again}, " if can_recompute else ""
    return f"parallel.micro_batch_size is 1 already: {first}lower model.seq_len, or {_smaller_model(config)}"


def _smaller_model(config: ExperimentConfig) -> str:
    if config.model.moe is None:
        return "make the model smaller (model.d_model, model.d_ff, model.num_layers)"
    return (
        "make the model smaller (model.moe.num_experts, model.moe.d_ff, model.d_model, model.num_layers), or share its "
        "experts among more ranks (parallel.ep_size)"
    )
