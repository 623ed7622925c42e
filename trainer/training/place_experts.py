"""Place the experts of a run on its ranks, before the model is built: as its config says, the same on every rank.

# L MoE layers, E experts.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from trainer.checkpoint.checkpoint_folder import CheckpointFolder
from trainer.checkpoint.find_checkpoint import CheckpointHandle, find_newest
from trainer.checkpoint.tensor_files import StoredTensors
from trainer.distributed.collective_errors import raise_together
from trainer.distributed.collectives import Group
from trainer.distributed.consistency import differences_across_ranks
from trainer.distributed.mesh import Mesh
from trainer.engine.base import COUNTS
from trainer.errors import ConfigError
from trainer.experiment import ExperimentConfig
from trainer.parallel.expert_placement import (
    ExpertPlacement,
    busiest_over_mean,
    contiguous_placement,
    named_placement,
    placement_by_loads,
)
from trainer.parallel.placement_programme import solve_placement


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlacement:
    """Placement of a run's experts."""

    placement: ExpertPlacement | None = None
    """None: contiguous."""
    checkpoint: CheckpointHandle | None = None
    """Newest one of the run, if it had to be found for `auto`."""
    said: str | None = None
    """Message to the user about a placement by load."""


def place_experts(
    config: ExperimentConfig, folder: CheckpointFolder, mesh: Mesh, *, warn: Callable[[str], None]
) -> RunPlacement:
    """Return the placement that a config names; `auto` is by the load in the newest checkpoint. Collective.

    Raises:
        ConfigError: on all ranks, if it is a file that does not fit, or that differs between ranks.
        CheckpointError: if there are checkpoints and none can be used.
    """
    moe, name = config.model.moe, config.parallel.placement
    if moe is None or mesh.ep.size == 1:
        return RunPlacement()
    sizes = len(config.model.moe_layers), moe.num_experts
    if name == "auto":
        newest = find_newest(folder, mesh.world, warn=warn)
        loads = None if newest is None else _recorded_loads(newest, mesh.world, sizes)
        if newest is None or loads is None:
            return RunPlacement(checkpoint=newest)
        placement, said = _placed_by_load(loads, mesh.ep.size, config.parallel.replicas, newest.step)
        return RunPlacement(placement=placement, checkpoint=newest, said=said)
    found, content = None, ""
    with raise_together(mesh.world):
        found = named_placement(name, *sizes, mesh.ep.size, num_copies=config.parallel.replicas)
        content = hashlib.sha256(json.dumps([found.owners, found.copies]).encode()).hexdigest()[:12]
    if different := differences_across_ranks(mesh.world, {"parallel": {"placement": content}}):
        raise ConfigError(f"{different[0]}, by their hashes; all ranks need the same file")
    return RunPlacement(placement=found)


def _recorded_loads(checkpoint: CheckpointHandle, world: Group, sizes: tuple[int, int]) -> list[list[int]] | None:
    """Return (L, E) the assignments to experts in the last step before a checkpoint, as rank 0 reads them.

    None if it is of another model, which resuming from it refuses.
    """
    loads = None
    with raise_together(world):
        if world.index == 0:
            with StoredTensors(checkpoint.path, checkpoint.manifest) as tensors:
                counts = tensors.read(COUNTS) if tensors.has(COUNTS) else None
            if counts is not None and counts.dim() == 2 and len(counts) == sizes[0] and counts.shape[1] >= sizes[1]:
                loads = counts[:, : sizes[1]].tolist()  # after them, one column for null experts
    return world.broadcast_object(loads)


def _placed_by_load(
    loads: Sequence[Sequence[int]], num_ranks: int, num_copies: int, step: int
) -> tuple[ExpertPlacement, str]:
    """Return the best placement by loads (L, E), and a line about it."""
    placement, layers = placement_by_loads(loads, num_ranks, solve_placement, num_copies=num_copies)
    plain = contiguous_placement(len(loads), len(loads[0]), num_ranks)
    now, before = (fmean(busiest_over_mean(loads, one)) for one in (placement, plain))
    worst = max(layer.busiest / max(1, layer.bound) for layer in layers)
    said = (
        f"experts are placed by their load in step {step}: the busiest rank has {now:.3f} times the mean rows "
        f"(contiguous: {before:.3f}), at most {worst - 1:.2%} above the best possible"
    )
    return placement, said
