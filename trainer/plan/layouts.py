"""Layouts of a config on a number of ranks: which are possible. Imports no torch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal, NamedTuple

from pydantic import ValidationError

from trainer.distributed.rank_layout import Degrees, ScheduleName
from trainer.errors import ConfigError
from trainer.experiment import ExperimentConfig
from trainer.parallel.pipeline_stages import SCHEDULES, check_micro_batches, num_passes
from trainer.plan.gpus import Gpu

Engine = Literal["native", "deepspeed"]
RECOMPUTES: Final = ("none", "norms_and_activations", "experts", "block")
ENGINES: Final = ("native", "deepspeed")
_LEAST_PART: Final = 1024
"""Tokens of a row that a rank has at least, if it is shared."""
_MOST_STAGES: Final = 16


class Cluster(NamedTuple):
    """Ranks of a run and their machines."""

    world_size: int
    per_node: int
    gpu: Gpu
    usable: int
    """Bytes for tensors on each rank."""


_OF_PARALLEL: Final = (
    *("ep_size", "data", "shard_size", "shard_keeps", "recompute", "micro_batch_size"),
    *("cp_size", "cp", "pp_size", "pp_schedule"),
)
_SHORT: Final = {"interleaved_1f1b": " i", "1f1b": "", "gpipe": " g", "zbv": " z", "dualpipe_v": " d"}


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedLayout:
    """One choice of everything under `parallel` and `engine` that a plan varies."""

    ep_size: int = 1
    data: Literal["replicate", "shard"] = "replicate"
    shard_size: int | None = None
    shard_keeps: str = "gradients"
    engine: Engine = "native"
    zero_stage: int = 1
    recompute: str = "none"
    micro_batch_size: int = 1
    hierarchical: bool = False
    """Rows go over nodes in two hops."""
    cp_size: int = 1
    cp: Literal["ulysses", "ring"] = "ulysses"
    pp_size: int = 1
    pp_schedule: ScheduleName = "1f1b"

    def applied(self, config: ExperimentConfig) -> ExperimentConfig | None:
        """Return a config with this layout; None if the rules between its sections do not allow it."""
        values = config.model_dump()
        own = values["parallel"]
        own["pp_layers"] = own["pp_layers"] if self.pp_size == own["pp_size"] else None
        own["tp_size"] = 1  # heads are not cut by a plan
        for key in _OF_PARALLEL:
            own[key] = getattr(self, key)
        if self.hierarchical:
            own["dispatcher"] = {"kind": "hierarchical"}
        if self.engine == "native":
            values["engine"] = {"kind": "native"}
        else:
            given = values["engine"] if values["engine"]["kind"] == "deepspeed" else {}
            values["engine"] = {**given, "kind": "deepspeed", "zero_stage": self.zero_stage}
        try:
            return ExperimentConfig.model_validate(values)
        except ValidationError:
            return None

    @property
    def sharding(self) -> str:
        """How weights and moments are shared, in a few words."""
        if self.engine == "deepspeed":
            return f"ZeRO {self.zero_stage}"
        if self.data == "replicate":
            return "replicate"
        over = "all" if self.shard_size is None else f"{self.shard_size}"
        return f"shard {over}, {self.shard_keeps}"

    @property
    def groups(self) -> str:
        """Degrees beside experts and shards, in a few words; empty if there are none."""
        rows = f"{'ring' if self.cp == 'ring' else 'cp'} {self.cp_size}" if self.cp_size > 1 else ""
        stages = f"pp {self.pp_size}{_SHORT[self.pp_schedule]}" if self.pp_size > 1 else ""
        return " ".join(part for part in (stages, rows) if part)

    @property
    def family(self) -> tuple[int, str, bool, str]:
        """Values that layouts share which differ only in micro-batches and recomputation."""
        return self.ep_size, self.sharding, self.hierarchical, self.groups

    def rows(self, config: ExperimentConfig, world_size: int) -> int:
        """Return the rows of a rank in a step, those that it shares counted whole."""
        return -(-config.train.global_batch_size // (world_size // (self.cp_size * self.pp_size)))

    def micro_batches(self, config: ExperimentConfig, world_size: int) -> int:
        """Return the micro-batches of a step."""
        return -(-self.rows(config, world_size) // self.micro_batch_size)

    def at_once(self, config: ExperimentConfig) -> int:
        """Return the micro-batches that pass through the layers together."""
        return 2 if config.parallel.overlap == "micro_batches" and self.ep_size > 1 else 1

    def passes(self, config: ExperimentConfig, world_size: int) -> int:
        """Return the passes that a schedule orders in a step."""
        return num_passes(self.micro_batches(config, world_size), self.at_once(config))

    @property
    def stages_per_rank(self) -> int:
        """Stages of the pipeline that a rank has."""
        return SCHEDULES[self.pp_schedule].stages_per_rank

    def idle(self, num_passes: int) -> float:
        """Return the time that a rank of a pipeline waits for its stages to fill and empty, by that in which it works.

        A stage of two on each rank is half as long.
        """
        return (self.pp_size - 1) / (self.stages_per_rank * num_passes)

    def contains(self, other: "PlannedLayout") -> bool:
        """Return whether this layout surely needs at least the memory of another one."""
        more = self.recompute in (other.recompute, "none") or other.recompute == "block"
        return self.family == other.family and more and self.micro_batch_size >= other.micro_batch_size


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """Choices that a plan varies; None: whatever is possible."""

    ep_sizes: Sequence[int] | None = None
    micro_batch_sizes: Sequence[int] | None = None
    recomputes: Sequence[str] = RECOMPUTES
    engines: Sequence[str] = ENGINES
    cp_sizes: Sequence[int] | None = None
    """None: those that leave each rank a long part of a row, of micro-batches of one row."""
    pp_sizes: Sequence[int] | None = None
    pp_schedules: Sequence[ScheduleName] = ("1f1b", "interleaved_1f1b")
    """Schedules, of those in `kept_passes.PLANNED`."""


def layouts_of(config: ExperimentConfig, cluster: Cluster, choices: Choices) -> Iterator[PlannedLayout]:
    """Yield every layout of the choices that the ranks, the experts and the rows of a step allow."""
    for groups in _groups(config, cluster, choices):
        num_stage = cluster.world_size // groups.pp_size
        rows = groups.rows(config, cluster.world_size)
        sizes = choices.micro_batch_sizes or [size for size in (1 << power for power in range(20)) if size <= rows]
        for ep_size in _ep_sizes(config, num_stage, choices):
            for one in _shardings(config, cluster, choices, replace(groups, ep_size=ep_size)):
                for recompute in choices.recomputes:
                    if recompute == "experts" and config.model.moe is None:
                        continue
                    for size in sizes:
                        if groups.cp_size > 1 and size > 1 and choices.cp_sizes is None:
                            continue  # whole rows would do
                        if _has_order(one, num_passes(-(-rows // size), one.at_once(config))):
                            yield replace(one, recompute=recompute, micro_batch_size=size)


def _groups(config: ExperimentConfig, cluster: Cluster, choices: Choices) -> Iterator[PlannedLayout]:
    """Yield degrees of shared rows and of pipelines."""
    layers = config.model.moe_layers or range(config.model.num_layers)
    for cp_size, kind in _shared_rows(config, cluster, choices):
        if choices.pp_sizes is None or 1 in choices.pp_sizes:
            yield PlannedLayout(cp_size=cp_size, cp=kind)
        for pp_size in _stages(cluster, choices):
            if cluster.world_size % (pp_size * cp_size) == 0:
                for schedule in choices.pp_schedules:
                    if pp_size * SCHEDULES[schedule].stages_per_rank <= len(layers):
                        yield PlannedLayout(cp_size=cp_size, cp=kind, pp_size=pp_size, pp_schedule=schedule)


def _shared_rows(
    config: ExperimentConfig, cluster: Cluster, choices: Choices
) -> Iterator[tuple[int, Literal["ulysses", "ring"]]]:
    """Yield sizes and kinds; on GPUs, where a ring has no fused kernel, it is for more ranks than heads only."""
    model, world = config.model, cluster.world_size
    for size in (1 << power for power in range(12)):
        allowed = size == 1 or model.seq_len // size >= _LEAST_PART
        if choices.cp_sizes is not None:
            allowed = size in choices.cp_sizes
        if not allowed or world % size or model.seq_len % (2 * size):
            continue
        if size == 1 or model.num_heads >= size:
            yield size, "ulysses"
        if size > 1 and (model.num_heads < size or cluster.gpu.name == "cpu"):
            yield size, "ring"


def _stages(cluster: Cluster, choices: Choices) -> Iterator[int]:
    if "native" not in choices.engines:
        return
    for size in (1 << power for power in range(1, 12)):
        is_wanted = size <= _MOST_STAGES if choices.pp_sizes is None else size in choices.pp_sizes
        if is_wanted and cluster.world_size % size == 0:
            yield size


def _has_order(layout: PlannedLayout, number: int) -> bool:
    """Return whether a schedule can order so many passes: no stage waits for more than it works."""
    if layout.pp_size == 1:
        return True
    if number < layout.pp_size:
        return False
    try:
        check_micro_batches(Degrees(pp_size=layout.pp_size, pp_schedule=layout.pp_schedule), number)
    except ConfigError:
        return False
    return True


def _ep_sizes(config: ExperimentConfig, num_ranks: int, choices: Choices) -> list[int]:
    moe = config.model.moe
    if moe is None:
        return [1]
    return [
        size
        for size in range(1, min(num_ranks, moe.num_experts) + 1)
        if num_ranks % size == 0
        and moe.num_experts % size == 0
        and (choices.ep_sizes is None or size in choices.ep_sizes)
    ]


def _shardings(
    config: ExperimentConfig, cluster: Cluster, choices: Choices, own: PlannedLayout
) -> Iterator[PlannedLayout]:
    """Yield the ways to share the weights of a stage, and to send rows over nodes."""
    ep_size, num_ranks = own.ep_size, cluster.world_size // own.pp_size
    spans = 1 < cluster.per_node < ep_size and ep_size % cluster.per_node == 0
    is_default = config.parallel.dispatcher.kind == "all_to_all"
    for hops in (False, True) if spans and is_default else (False,):
        own = replace(own, hierarchical=hops)
        if "native" in choices.engines:
            yield own
            groups = {None: num_ranks} | ({} if own.pp_size > 1 else {cluster.per_node: cluster.per_node})
            for given, size in groups.items() if num_ranks > 1 else ():
                fits = num_ranks % size == 0 and (size % ep_size == 0 or ep_size % size == 0)
                if fits and size > 1 and (given is None or size < num_ranks):
                    for keeps in ("weights", "gradients", "nothing"):
                        yield replace(own, data="shard", shard_size=given, shard_keeps=keeps)
        may_deepspeed = config.optim.kind == "adamw" and config.train.dtype != "float64" and own.pp_size == 1
        if "deepspeed" in choices.engines and may_deepspeed:
            for stage in (1, 2):
                yield replace(own, engine="deepspeed", zero_stage=stage)
