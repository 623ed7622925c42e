"""Plan which checkpoints of a stopped run to remove. Imports no torch."""

from dataclasses import dataclass
from pathlib import Path

from trainer.checkpoint.checkpoint_folder import CheckpointFolder
from trainer.errors import CheckpointError


@dataclass(frozen=True, slots=True, kw_only=True)
class PrunePlan:
    """Checkpoints to remove and to keep."""

    remove: list[int]
    keep: list[int]
    damaged: dict[int, str]
    """Steps of damaged checkpoints, with the reason; removed only on request."""
    leftovers: list[Path]


def plan_prune(folder: CheckpointFolder, *, with_damaged: bool) -> PrunePlan:
    """Verify all checkpoints of a run and plan which to remove. The caller must hold the run's lock.

    Raises:
        CheckpointError: if there is no intact checkpoint: the last remains of a run are never removed.
    """
    folder.resolve_step(None)
    reasons = {step: folder.defect(step) for step in folder.steps()}
    damaged = {step: reason for step, reason in reasons.items() if reason is not None}
    intact = [step for step in reasons if step not in damaged]
    if not intact:
        raise CheckpointError(f"{folder.path}: none of {len(damaged)} checkpoints is intact; nothing is removed")
    outdated = [step for step in folder.outdated(newest=intact[-1]) if step not in damaged]
    remove = sorted([*outdated, *damaged]) if with_damaged else outdated
    keep = [step for step in intact if step not in remove]
    return PrunePlan(remove=remove, keep=keep, damaged=damaged, leftovers=folder.leftovers())
