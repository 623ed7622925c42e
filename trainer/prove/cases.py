"""Layouts of a proof: ranks, expert parallelism, dispatchers, micro-batches, engines. Imports no torch."""

from dataclasses import dataclass
from typing import Literal

from trainer.distributed.rank_layout import ScheduleName
from trainer.engine.deepspeed.config import DeepSpeedEngineConfig
from trainer.engine.deepspeed.passthrough import free_options
from trainer.engine.registry import NativeEngineConfig
from trainer.experiment import ExperimentConfig
from trainer.models.config import Recompute, ShardKeeps
from trainer.moe.dispatch.registry import WireOptions

MAX_RANKS, MOST_RANKS = 4, 8
"""Ranks of a proof unless more are asked for; the most that can be."""
ENGINES = ("native", "deepspeed")
_COARSE_KERNELS = ("mxfp8",)
"""Kernels that round rows together, so that what is learned depends on which rows are in a micro-batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One layout."""

    world_size: int = 1
    ep_size: int = 1
    pp_size: int = 1
    pp_schedule: ScheduleName = "1f1b"
    cp_size: int = 1
    cp: Literal["ulysses", "ring"] = "ulysses"
    tp_size: int = 1
    placement: Literal["contiguous", "round_robin"] = "contiguous"
    moves_to: Literal["contiguous", "round_robin"] | None = None
    """Placement with which the run goes on after the first step, from a checkpoint; None: it goes on as it is."""
    replicas: int = 0
    """Copies of other ranks' experts on each rank."""
    dispatcher: str = "all_to_all"
    chunks: int = 1
    row_budget: float | None = None
    """Size of receive buffers, as a multiple of an even share of the rows; None: by the rows of each step."""
    data: Literal["replicate", "shard"] = "replicate"
    shard_size: int | None = None
    shard_keeps: ShardKeeps = "gradients"
    deterministic: bool = False
    ranks_per_node: int = MOST_RANKS
    """If smaller than the number of ranks, simulates several nodes on this machine."""
    zero_stage: int | None = None
    """ZeRO stage of the DeepSpeed engine; None for the native one."""
    micro_batch_size: int
    loss_chunk: int | None = None
    """Tokens whose logits exist at once; None: those of a micro-batch."""
    recompute: Recompute = "none"
    overlap: Literal["none", "micro_batches"] = "none"
    replays: bool = False
    """Replay the experts that a first training under the same layout has chosen."""

    @property
    def name(self) -> str:
        """Name of the layout in the table."""
        ranks = "1 rank" if self.world_size == 1 else f"{self.world_size} ranks, ep {self.ep_size}"
        ranks += f", pp {self.pp_size} {self.pp_schedule}" if self.pp_size > 1 else ""
        ranks += f", cp {self.cp_size} {self.cp}" if self.cp_size > 1 else ""
        ranks += f", tp {self.tp_size}" if self.tp_size > 1 else ""
        how = "" if self.ep_size == 1 else f", {self.dispatcher}"
        how += f" in {self.chunks} chunks" if self.chunks > 1 else ""
        how += f" of {self.row_budget:g} shares" if self.row_budget is not None else ""
        how += f", {self.placement}" if self.placement != "contiguous" else ""
        how += f" then {self.moves_to}" if self.moves_to is not None else ""
        how += f", {self.replicas} copies each" if self.replicas else ""
        sharding = ", shard" if self.data == "shard" else ""
        sharding += f" by {self.shard_size}" if self.shard_size is not None else ""
        sharding += f" keeping {self.shard_keeps}" if self.shard_keeps != "gradients" else ""
        engine = "" if self.zero_stage is None else f", ZeRO {self.zero_stage}"
        engine += ", deterministic" if self.deterministic else ""
        loss = "" if self.loss_chunk is None else f", loss by {self.loss_chunk}"
        again = "" if self.recompute == "none" else f", recompute {self.recompute}"
        again += ", overlapped" if self.overlap != "none" else ""
        again += ", replayed" if self.replays else ""
        return f"{ranks}{how}{sharding}{engine}, rows by {self.micro_batch_size}{loss}{again}"

    @property
    def engine(self) -> str:
        """Engine of the layout."""
        return "native" if self.zero_stage is None else "deepspeed"


def reference(config: ExperimentConfig) -> Case:
    """Return the layout that all others are compared with: one process, one micro-batch."""
    return Case(micro_batch_size=config.train.global_batch_size)


def apply_case(config: ExperimentConfig, case: Case) -> ExperimentConfig:
    """Return the config with another layout."""
    current, kernel = config.parallel.dispatcher, config.parallel.experts_kernel
    dispatcher = current.model_dump() if current.kind == case.dispatcher else {"kind": case.dispatcher}
    if case.chunks > 1 or "chunks" in dispatcher:
        dispatcher["chunks"] = case.chunks
    if case.row_budget is not None or "row_budget" in dispatcher:
        dispatcher["row_budget"] = case.row_budget
    parallel = {
        **config.parallel.model_dump(),
        "ep_size": case.ep_size,
        "pp_size": case.pp_size,
        "pp_schedule": case.pp_schedule,
        "pp_layers": None,
        "cp_size": case.cp_size,
        "cp": case.cp,
        "tp_size": case.tp_size,
        "placement": case.placement,
        "replicas": case.replicas,
        "micro_batch_size": case.micro_batch_size,
        "dispatcher": dispatcher,
        "data": case.data,
        "loss_chunk": case.loss_chunk,
        "recompute": case.recompute,
        "overlap": case.overlap,
        "shard_size": case.shard_size,
        "shard_keeps": case.shard_keeps,
        "deterministic": case.deterministic,
        "experts_kernel": _proved_kernel(kernel),
        "device": "cpu",
        "compile": False,
    }
    engine = NativeEngineConfig().model_dump()
    if case.zero_stage is not None:
        options = config.engine if isinstance(config.engine, DeepSpeedEngineConfig) else DeepSpeedEngineConfig()
        engine = options.model_dump() | {"zero_stage": case.zero_stage}
    others = config.model_dump()
    if max(case.pp_size, case.cp_size, case.tp_size) > 1:  # what only looks, and needs whole rows or all layers
        others["metrics"] |= {"routing_record": None, "routing_gap_every": None}
    return ExperimentConfig.model_validate({**others, "parallel": parallel, "engine": engine})


def in_dtype(config: ExperimentConfig, dtype: str) -> ExperimentConfig:
    """Return the config with a proof's dtype, device, kernel and dispatcher; its own may not have the dtype or CPUs."""
    values = config.model_dump()
    values["train"]["dtype"] = dtype
    dispatcher, kernel = config.parallel.dispatcher.on_any_device(), _proved_kernel(config.parallel.experts_kernel)
    values["parallel"] |= {"device": "cpu", "dispatcher": dispatcher.model_dump(), "experts_kernel": kernel}
    return ExperimentConfig.model_validate(values)


def _proved_kernel(kernel: str) -> str:
    """Return the experts kernel of a proof: `auto` for the project's own, which are equal up to rounding."""
    return kernel if ":" in kernel or kernel in _COARSE_KERNELS else "auto"


def without_repeated_options(config: ExperimentConfig) -> ExperimentConfig:
    """Drop keys of `deepspeed_config` that repeat other sections, which a proof changes.

    Also drop the bucket size: in some layouts ranks hold different numbers of experts.
    """
    if not isinstance(config.engine, DeepSpeedEngineConfig):
        return config
    raw = free_options(config.engine.deepspeed_config)
    raw.get("zero_optimization", {}).pop("reduce_bucket_size", None)
    return config.model_copy(update={"engine": config.engine.model_copy(update={"deepspeed_config": raw})})


def labels(config: ExperimentConfig) -> list[str]:
    """Return the settings that are not layout-invariant by definition: their differences do not fail a proof."""
    moe = config.model.moe
    if moe is None:
        return []
    found = []
    dispatcher = config.parallel.dispatcher
    rounds_rows = isinstance(dispatcher, WireOptions) and dispatcher.wire == "bfloat16"
    if rounds_rows and config.train.dtype != "bfloat16":  # under bfloat16 the rows are bfloat16 anyway
        found.append("parallel.dispatcher.wire: bfloat16")
    if config.parallel.experts_kernel in _COARSE_KERNELS:
        found.append(f"parallel.experts_kernel: {config.parallel.experts_kernel}")
    if moe.capacity.scope == "rank" and moe.can_drop:
        found.append("model.moe.capacity.scope: rank")
    variant = [term for term in moe.aux_losses.terms() if not term.is_layout_invariant]
    if variant:
        key = "scope: micro_batch" if variant[0].scope == "micro_batch" else "counts: running"
        losses = " and ".join(f"{term.name}_loss" for term in variant)
        found.append(f"model.moe.balance.{key} ({losses})")
    return found
