"""Gloo processes for tests: started once, run functions together, killed if they hang."""

import faulthandler
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from trainer.distributed.flight_recorder import FlightRecorder
from trainer.distributed.mesh import Mesh, build_mesh
from trainer.distributed.rank_layout import Layout
from trainer.prove.pool import Failure, LocalRanks

TIMEOUT_S = 120.0
_STACKS_AFTER_S = 200.0
"""Seconds after which a rank writes where it is, before the time of its test is over."""


class Ranks(LocalRanks):
    """Process pool that runs a function on ranks 0 .. n - 1 of a fresh process group."""

    def run(self, world_size: int, function: Callable[..., Any], *args: Any, timeout_s: float = TIMEOUT_S) -> list[Any]:
        """Return the result of `function(*args)` on each rank.

        Raises:
            AssertionError: with the traceback of each failed rank, or on a timeout.
        """
        answers = super().run(world_size, _with_stacks, function, *args, timeout_s=timeout_s)
        errors = [
            f"rank {rank}:\n{answer.text or 'died or hangs'}"
            for rank, answer in enumerate(answers)
            if isinstance(answer, Failure)
        ]
        if errors:
            raise AssertionError("\n".join(errors))
        return answers


def _with_stacks(function: Callable[..., Any], *args: Any) -> Any:
    """Run a function; if it hangs, write the stacks of this rank's threads to stderr."""
    faulthandler.dump_traceback_later(_STACKS_AFTER_S)
    try:
        return function(*args)
    finally:
        faulthandler.cancel_dump_traceback_later()


def mesh_here(
    *,
    ep_size: int = 1,
    ranks_per_node: int = 1,
    shard_size: int | None = None,
    cp_size: int = 1,
    recorder: FlightRecorder | None = None,
    **pipeline: Any,
) -> Mesh:
    """Return the mesh of the calling rank, inside a function that `Ranks` runs."""
    layout = Layout(
        world_size=dist.get_world_size(),
        rank=dist.get_rank(),
        ep_size=ep_size,
        ranks_per_node=ranks_per_node,
        shard_size=shard_size,
        cp_size=cp_size,
        **pipeline,
    )
    return build_mesh(layout, recorder or FlightRecorder())
