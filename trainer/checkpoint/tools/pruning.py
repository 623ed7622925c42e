"""Choose which checkpoints of a stopped run to remove. Imports no torch."""

from dataclasses import dataclass
from pathlib import Path

from trainer.checkpoint.checkpoint_folder import CheckpointFolder
from trainer.errors import CheckpointError


@dataclass(frozen=True, slots=True, kw_only=True)
class PrunePlan:
    """Checkpoints to remove and to keep."""

    remove: list[int]
    """Steps whose checkpoint goes, oldest first."""
    keep: list[int]
    """Steps whose sound checkpoint stays."""
    damaged: dict[int, str]
    """Steps whose checkpoint is not sound, and why; they are among those that go only if that was asked for."""
    leftovers: list[Path]
    """Leftovers of killed runs, to be removed."""


def plan_prune(folder: CheckpointFolder, *, with_damaged: bool) -> PrunePlan:
    """Judge every checkpoint of a run, which reads all of them. Only for who holds the run's lock.

    Args:
        folder: of the run; says how many to keep.
        with_damaged: let those go that are not sound.

    Raises:
        CheckpointError: if there is none, or none is sound: what is left of a run is not thrown away.
    """
    folder.resolve_step(None)
    reasons = {step: folder.defect(step) for step in folder.steps()}
    damaged = {step: reason for step, reason in reasons.items() if reason is not None}
    sound = [step for step in reasons if step not in damaged]
    if not sound:
        raise CheckpointError(f"{folder.path}: none of {len(damaged)} checkpoints is sound; nothing is removed")
    outdated = [step for step in folder.outdated(newest=sound[-1]) if step not in damaged]
    remove = sorted([*outdated, *damaged]) if with_damaged else outdated
    return PrunePlan(
        remove=remove,
        keep=[step for step in sound if step not in remove],
        damaged=damaged,
        leftovers=folder.leftovers(),
    )
