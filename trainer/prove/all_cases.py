"""All layouts that a config is proven under. Imports no torch."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from trainer.engine.deepspeed.config import DeepSpeedEngineConfig
from trainer.errors import ConfigError
from trainer.experiment import ExperimentConfig
from trainer.moe.dispatch.registry import LocalDispatcherConfig, WireOptions
from trainer.parallel.pipeline_stages import check_micro_batches
from trainer.prove.cases import MAX_RANKS, Case, apply_case, reference
from trainer.prove.many_ranks import many_ranks


def all_cases(
    config: ExperimentConfig, engines: Sequence[str] | None = None, most_ranks: int = MAX_RANKS
) -> list[Case]:
    """Return every layout of one to four ranks that the config allows, DeepSpeed's with both stages.

    Without `engines`, only the config's own engine, and its ZeRO stage, are included. With `most_ranks` above four,
    some of so many ranks are added.
    """
    stages: Sequence[int] = (1, 2)
    if engines is None:
        engines = [config.engine.kind]
        stages = [config.engine.zero_stage] if isinstance(config.engine, DeepSpeedEngineConfig) else ()
    cases = [case for case in _native_cases(config) if case.world_size <= most_ranks]
    cases += [case for case in many_ranks(config.train.global_batch_size, most_ranks) if _is_possible(config, case)]
    found = cases if "native" in engines else []
    if "deepspeed" in engines:
        # Dispatchers and engines are independent: one dispatcher is enough.
        usual = Case(micro_batch_size=1)
        kept = ("dispatcher", "chunks", "row_budget", "data", "cp", "tp_size", "pp_size", "overlap")
        plain = [case for case in cases if all(getattr(case, key) == getattr(usual, key) for key in kept)]
        plain.insert(0, reference(config))
        found = found + [replace(case, zero_stage=stage) for stage in stages for case in plain]
    return found


def _native_cases(config: ExperimentConfig) -> list[Case]:
    rows, moe, dispatcher = config.train.global_batch_size, config.model.moe, config.parallel.dispatcher
    num_experts = 1 if moe is None else moe.num_experts
    # Halves and single rows; equal for two rows, and none for one row, which is the reference.
    sizes = [size for size in dict.fromkeys((-(-rows // 2), 1)) if size < rows]
    some = config.model.seq_len // 2 + 1  # tokens: chunks of the loss that do not end with rows
    cases = [
        Case(micro_batch_size=size, loss_chunk=some, recompute="norms_and_activations")
        if size == 1
        else Case(micro_batch_size=size, recompute="experts")
        for size in sizes
    ]
    for world_size in range(2, MAX_RANKS + 1):
        share = -(-rows // world_size)
        for ep_size in range(1, min(world_size, num_experts) + 1):
            if world_size % ep_size:
                continue
            degrees = {"world_size": world_size, "ep_size": ep_size}
            half = Case(**degrees, micro_batch_size=-(-share // 2), loss_chunk=some, recompute="block")
            cases.append(Case(**degrees, micro_batch_size=share))
            if share > 1:
                cases.append(half)
            cases += [replace(half, **sharding) for sharding in _shardings(degrees)]
            if ep_size == 1:
                continue
            kinds = ["all_gather", "deduplicated_all_to_all"]
            if moe is not None and moe.capacity.factor is not None:
                kinds.append("padded_all_to_all")
            if not dispatcher.needs_gpus and not isinstance(dispatcher, WireOptions | LocalDispatcherConfig):
                kinds.append(dispatcher.kind)  # a plug-in
            cases += [Case(**degrees, dispatcher=kind, micro_batch_size=share) for kind in kinds]
            if num_experts > ep_size:
                moved = Case(**degrees, placement="round_robin", moves_to="contiguous", micro_batch_size=share)
                cases += [moved, Case(**degrees, replicas=1, micro_batch_size=share)]
            if num_experts // ep_size > 1:
                cases.append(Case(**degrees, chunks=2, micro_batch_size=share, recompute="block"))
            if moe is not None and moe.router.has_fixed_k and ep_size == world_size:
                # Steps taken again, or buffers that always suffice.
                budget = float(ep_size) if ep_size == MAX_RANKS else 1.0
                cases.append(Case(**degrees, row_budget=budget, micro_batch_size=share))
            if ep_size == 4:
                cases.append(Case(**degrees, dispatcher="hierarchical", ranks_per_node=2, micro_batch_size=share))
            cases += _overlapped(degrees, share)
    cases += _shared_rows(config)
    cases += _tensor_parallel(config)
    cases += _pipelines(config)
    if config.train.routing_replay is not None or config.metrics.routing_record is not None:
        whole = [case for case in cases if case.pp_size == 1]  # a stage does not know the experts of others
        cases += [replace(case, replays=True) for case in whole if case.data == "replicate" and case.chunks == 1]
    return cases


def _overlapped(degrees: dict[str, Any], share: int) -> list[Case]:
    """Return layouts in which pairs of micro-batches overlap: even and odd numbers of them, sharded or not."""
    if share == 1:
        return []
    single = Case(**degrees, micro_batch_size=1, overlap="micro_batches")
    if degrees["world_size"] == degrees["ep_size"]:
        return [single]
    return [replace(single, micro_batch_size=-(-share // 2), data="shard", recompute="block")]


def _shared_rows(config: ExperimentConfig) -> list[Case]:
    """Return layouts in which ranks share rows: of two and of four, experts over more, fewer or as many ranks."""
    model, rows = config.model, config.train.global_batch_size
    most = 1 if model.moe is None else model.moe.num_experts
    degrees: list[dict[str, Any]] = [
        {"world_size": 2, "cp_size": 2},
        {"world_size": 4, "cp_size": 2, "ep_size": 4, "recompute": "block"},
        {"world_size": 4, "cp_size": 2, "ep_size": 2, "data": "shard"},
        {"world_size": 4, "cp_size": 4, "ep_size": 2},
    ]
    return [
        Case(**of_ranks, cp=kind, micro_batch_size=-(-rows * of_ranks["cp_size"] // of_ranks["world_size"]))
        for of_ranks in degrees
        for kind in ("ulysses", "ring")
        if of_ranks.get("ep_size", 1) <= most and model.seq_len % (2 * of_ranks["cp_size"]) == 0
        if kind == "ring" or of_ranks["cp_size"] <= model.num_heads
    ]


def _tensor_parallel(config: ExperimentConfig) -> list[Case]:
    """Return layouts in which ranks share heads: beside experts, sharding, stages and rows that others share too."""
    rows, moe = config.train.global_batch_size, config.model.moe
    possible = [
        Case(world_size=2, tp_size=2, micro_batch_size=rows),
        Case(world_size=2, tp_size=2, ep_size=1 if moe is None else 2, micro_batch_size=1, recompute="block"),
        Case(world_size=4, tp_size=2, ep_size=1 if moe is None else 2, data="shard", micro_batch_size=-(-rows // 2)),
        Case(world_size=4, tp_size=2, cp_size=2, micro_batch_size=rows, recompute="norms_and_activations"),
        Case(world_size=4, tp_size=2, pp_size=2, pp_schedule="gpipe", micro_batch_size=1),
        Case(world_size=4, tp_size=4, ep_size=1 if moe is None else 4, micro_batch_size=rows),
    ]
    return [case for case in possible if _is_possible(config, case)]


def _pipelines(config: ExperimentConfig) -> list[Case]:
    """Return layouts with stages: each schedule, beside experts over ranks, sharding, shared rows and overlap."""
    rows, moe = config.train.global_batch_size, config.model.moe
    possible = [
        Case(world_size=2, pp_size=2, micro_batch_size=1, recompute="block"),
        Case(world_size=2, pp_size=2, pp_schedule="gpipe", micro_batch_size=-(-rows // 2)),
        Case(world_size=2, pp_size=2, pp_schedule="interleaved_1f1b", micro_batch_size=1),
        Case(world_size=2, pp_size=2, pp_schedule="zbv", micro_batch_size=1),
        Case(world_size=2, pp_size=2, pp_schedule="dualpipe_v", micro_batch_size=1),
        Case(world_size=4, pp_size=4, micro_batch_size=1),
        Case(world_size=4, pp_size=2, ep_size=1 if moe is None else 2, data="shard", micro_batch_size=1),
        Case(world_size=4, pp_size=2, cp_size=2, pp_schedule="gpipe", micro_batch_size=1),
    ]
    if moe is not None:
        pairs = Case(world_size=4, pp_size=2, ep_size=2, overlap="micro_batches", micro_batch_size=1)
        possible += [pairs, replace(pairs, pp_schedule="zbv")]
    return [case for case in possible if _is_possible(config, case)]


def _is_possible(config: ExperimentConfig, case: Case) -> bool:
    """Return whether a config accepts a layout, and has enough micro-batches for its schedule."""
    data_size = case.world_size // case.pp_size // case.cp_size // case.tp_size
    rows = -(-config.train.global_batch_size // data_size)
    try:
        parallel = apply_case(config, case).parallel
        check_micro_batches(parallel.degrees, -(-rows // case.micro_batch_size), at_once=parallel.at_once)
    except (ConfigError, ValidationError):
        return False
    return True


def _shardings(degrees: dict[str, int]) -> list[dict[str, Any]]:
    """Return the ways to shard over these ranks: over all, in groups of two, and what stays whole in a step."""
    found: list[dict[str, Any]] = [{"data": "shard"}]
    if degrees["world_size"] == MAX_RANKS:
        found += [{"data": "shard", "shard_size": 2, "shard_keeps": keeps} for keeps in ("gradients", "nothing")]
    if degrees == {"world_size": 2, "ep_size": 1}:
        found.append({"data": "shard", "shard_keeps": "nothing"})
        found.append({"data": "shard", "shard_keeps": "weights", "deterministic": True})
    return found
