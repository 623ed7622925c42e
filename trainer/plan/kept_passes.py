"""Forward passes that a rank of a pipeline keeps at once, by the schedules of torch. Imports no torch.

# P ranks of a pipeline, n micro-batches.
"""

from typing import Final

from trainer.distributed.rank_layout import ScheduleName
from trainer.parallel.pipeline_stages import PipelineStages

PLANNED: Final[tuple[ScheduleName, ...]] = ("1f1b", "interleaved_1f1b", "gpipe")
"""Schedules whose order is known here."""


def kept_passes(schedule: ScheduleName, pp_size: int, rank: int, number: int) -> tuple[int, ...]:
    """Return the most forward passes of each stage of a rank whose backward pass is still to come, of `number`.

    #  1f1b, P 4     rank 0: 4    1: 3    2: 2    3: 1
    #  interleaved   it starts P passes of its first stage, P of its second, and goes on until the first comes back
    """
    if schedule == "gpipe":
        return (number,)
    if schedule == "1f1b":
        return (min(number, pp_size - rank),)
    assert schedule == "interleaved_1f1b", "orders of other schedules are not known here"
    at_once = number // max(1, number // pp_size)
    passes = min(2 * number, at_once + 2 * (pp_size - 1 - rank) + 1)
    second = sum(place // at_once % 2 for place in range(passes))
    return passes - second, second


def kept_layers(schedule: ScheduleName, stages: PipelineStages, rank: int, number: int) -> int:
    """Return the layers whose passes a rank keeps at once, each pass counted."""
    passes = kept_passes(schedule, stages.num_ranks, rank, number)
    return sum(len(stages.layers[stage]) * n for stage, n in zip(stages.of_rank(rank), passes, strict=True))


def received_buffers(stages_per_rank: int, *, num_neighbours: int) -> int:
    """Return the messages of a pass for which a rank has buffers: torch makes those of all passes before the first."""
    if stages_per_rank == 1:
        return num_neighbours
    return 3 if num_neighbours == 1 else 4
