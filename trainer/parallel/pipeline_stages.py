"""Stages of a pipeline: which consecutive layers each has, and which rank has which stages. Imports no torch.

loop    rank 0: stages 0, 2    rank 1: stages 1, 3        a rank's stages are as many ranks apart
v       rank 0: stages 0, 3    rank 1: stages 1, 2        there and back: the first rank has the last stage too
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from trainer.distributed.rank_layout import Degrees, ScheduleName
from trainer.errors import ConfigError
from trainer.models.config import ModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineSchedule:
    """Schedule of torch.distributed.pipelining."""

    torch_name: str
    stages_per_rank: int = 1
    placement: Literal["loop", "v"] = "loop"
    takes_list: bool = True
    """Torch's class takes a list of stages."""


SCHEDULES: dict[ScheduleName, PipelineSchedule] = {
    "gpipe": PipelineSchedule(torch_name="ScheduleGPipe", takes_list=False),
    "1f1b": PipelineSchedule(torch_name="Schedule1F1B", takes_list=False),
    "interleaved_1f1b": PipelineSchedule(torch_name="ScheduleInterleaved1F1B", stages_per_rank=2),
    "zbv": PipelineSchedule(torch_name="ScheduleZBVZeroBubble", stages_per_rank=2, placement="v"),
    "dualpipe_v": PipelineSchedule(torch_name="ScheduleDualPipeV", stages_per_rank=2, placement="v"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineStages:
    """Stages of a model over the ranks of a pipeline."""

    layers: tuple[range, ...]
    """Layers of each stage."""
    num_ranks: int
    schedule: PipelineSchedule

    @property
    def number(self) -> int:
        """Stages in all."""
        return len(self.layers)

    def rank_of(self, stage: int) -> int:
        """Return the index of the rank that has a stage."""
        turn, place = divmod(stage, self.num_ranks)
        return self.num_ranks - 1 - place if self.schedule.placement == "v" and turn % 2 else place

    def of_rank(self, index: int) -> tuple[int, ...]:
        """Return the stages of a rank, in order."""
        return tuple(stage for stage in range(self.number) if self.rank_of(stage) == index)

    def layers_of(self, index: int) -> list[int]:
        """Return the layers of a rank, in order."""
        return [layer for stage in self.of_rank(index) for layer in self.layers[stage]]


def pipeline_stages(config: ModelConfig, vocab_size: int, degrees: Degrees) -> PipelineStages:
    """Return the stages of a model with so many ids: those that were given, or of about the same FLOPs.

    Raises:
        ConfigError: if there are too few layers, or those given do not fit.
    """
    schedule = SCHEDULES[degrees.pp_schedule]
    num_stages, L = degrees.pp_size * schedule.stages_per_rank, config.num_layers
    has_moe = [config.moe is None or config.has_experts(layer) for layer in range(L)]
    if degrees.pp_layers is None:
        head = 2.0 * vocab_size * config.d_model
        layers = even_stages(layer_flops(config), num_stages, last=head, is_enough=has_moe)
    elif len(degrees.pp_layers) != num_stages or sum(degrees.pp_layers) != L:
        given = f"{len(degrees.pp_layers)} stages with {sum(degrees.pp_layers)} layers"
        raise ConfigError(f"parallel.pp_layers: {given}, where {num_stages} with {L} (model.num_layers) are needed")
    else:
        ends = list(itertools.accumulate(degrees.pp_layers))
        layers = tuple(range(end - size, end) for end, size in zip(ends, degrees.pp_layers, strict=True))
    if lacking := [stage for stage, part in enumerate(layers) if not any(has_moe[layer] for layer in part)]:
        raise ConfigError(f"parallel.pp_layers: stage {lacking[0]} has no MoE layer; every stage needs one")
    return PipelineStages(layers=layers, num_ranks=degrees.pp_size, schedule=schedule)


def num_passes(num_micro_batches: int, at_once: int) -> int:
    """Return the passes that a schedule orders: of micro-batches, or of pairs of them that overlap (`at_once` 2)."""
    return -(-num_micro_batches // at_once)


def check_micro_batches(degrees: Degrees, num_micro_batches: int, *, at_once: int = 1) -> None:
    """Check that the schedule, if there are stages, can order so many micro-batches, of which `at_once` pass together.

    Raises:
        ConfigError: if they are too few, or of a wrong number.
    """
    if degrees.pp_size == 1:
        return
    size, given = degrees.pp_size, f"{degrees.pp_schedule} over {degrees.pp_size} groups of ranks"
    number = num_passes(num_micro_batches, at_once)
    what = "micro-batches" if at_once == 1 else "pairs of micro-batches (parallel.overlap)"
    remedy = "lower parallel.micro_batch_size, or raise train.global_batch_size"
    least = {"gpipe": 1, "1f1b": size, "interleaved_1f1b": 1, "zbv": 1, "dualpipe_v": 2 * size}[degrees.pp_schedule]
    if number < least:
        problem = f"{given} needs {least} {what} in a step, and a rank has {number}"
        raise ConfigError(f"parallel.pp_schedule: {problem}; {remedy}, or use gpipe")
    rounds = max(1, number // size)
    if degrees.pp_schedule == "interleaved_1f1b" and number % rounds:
        problem = f"{given} takes a multiple of {rounds} {what}, and a rank has {number} in a step"
        raise ConfigError(f"parallel.pp_schedule: {problem}; {remedy}")


def layer_flops(config: ModelConfig) -> list[float]:
    """Return the FLOPs of a token's forward pass in each block."""
    moe, found = config.moe, []
    for layer, window in enumerate(config.windows):
        weights = config.attention_weights()
        if moe is None or not config.has_experts(layer):
            weights += config.feed_forward_weights(config.d_ff)
        else:
            weights += moe.num_experts * config.d_model + config.feed_forward_weights(moe.shared_width)
            weights += moe.experts_per_token * config.feed_forward_weights(moe.d_ff)
        keys = min(window or config.seq_len, config.seq_len)
        found.append(2.0 * weights + 2.0 * config.num_heads * keys * sum(config.head_widths))
    return found


def even_stages(
    costs: Sequence[float], num_stages: int, *, last: float = 0.0, is_enough: Sequence[bool] = ()
) -> tuple[range, ...]:
    """Return consecutive layers for each stage, so that the costliest stage costs least.

    `costs` are those of the layers, `last` what the last stage has beyond its layers. Every stage gets a layer that
    `is_enough` for one; any is, if that is empty. Among the best, earlier stages have the fewer layers: they keep more
    micro-batches.

    Raises:
        ConfigError: if there are fewer such layers than stages.
    """
    L = len(costs)
    enough = list(itertools.accumulate(is_enough or [True] * L, initial=0))
    if num_stages > enough[-1]:
        kind = "MoE layers" if is_enough else "layers"
        raise ConfigError(f"parallel.pp_size: {num_stages} stages need as many {kind}, and the model has {enough[-1]}")
    before = list(itertools.accumulate(costs, initial=0.0))

    def cost_of(start: int, end: int) -> float:
        if enough[end] == enough[start]:
            return math.inf
        return before[end] - before[start] + (last if end == L else 0.0)

    # best[s][e]: least cost of the costliest of s + 1 stages over the layers before e, and where the last one starts
    best = [{end: (cost_of(0, end), 0) for end in range(1, L + 1)}]
    for stage in range(1, num_stages):
        best.append(
            {
                end: min((max(best[-1][start][0], cost_of(start, end)), start) for start in range(stage, end))
                for end in range(stage + 1, L + 1)
            }
        )
    stages, end = [], L
    for table in reversed(best):
        start = table[end][1]
        stages.append(range(start, end))
        end = start
    return tuple(reversed(stages))
