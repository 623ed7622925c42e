"""Find the checkpoint to resume from: the newest intact one, verified by all ranks together."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer import fault_injection
from trainer.checkpoint.checkpoint_folder import CheckpointFolder
from trainer.checkpoint.file_integrity import check_file
from trainer.checkpoint.manifest import Manifest, UnsupportedFormat
from trainer.checkpoint.safetensors_file import check_finite_values
from trainer.distributed.collective_errors import wait_for_all
from trainer.distributed.collectives import Group
from trainer.distributed.rank_layout import format_ranks
from trainer.distributed.wire_format import error_from_wire, error_to_wire
from trainer.errors import CheckpointError, ResourceError


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointHandle:
    """A verified checkpoint."""

    path: Path
    manifest: Manifest

    @property
    def step(self) -> int:
        """Completed steps."""
        return self.manifest.step

    @property
    def run(self) -> Mapping[str, Any]:
        """Record of the run."""
        return self.manifest.run


def find_newest(folder: CheckpointFolder, group: Group, *, warn: Callable[[str], None]) -> CheckpointHandle | None:
    """Return the newest intact checkpoint, the same on every rank; None if the folder has no checkpoint; collective.

    The folder, as rank 0 sees it, is listed again for each candidate, since a training run may meanwhile remove one and
    save another. `warn` is called with one line for each damaged checkpoint that is skipped.

    Raises:
        CheckpointError: if every checkpoint is damaged, since a run never starts over silently; if another version
            wrote the newest one; if ranks see different ones.
        ResourceError: if a rank cannot read the newest one now; it may be intact, so it is not skipped.
    """
    rejected: dict[int, str] = {}
    while True:
        steps = [step for step in folder.steps() if step not in rejected] if group.index == 0 else []
        step = group.broadcast_object(max(steps, default=None))
        if step is None:
            break
        fault_injection.hit("resume.candidate")
        found = _check(folder, step, group)
        if isinstance(found, CheckpointHandle):
            for reason in rejected.values():
                warn(f"{reason}; using step {step} instead")
            return found
        rejected[step] = found
    if rejected:
        raise CheckpointError(
            f"{'; '.join(rejected.values())}; no other checkpoint is left: restore it, or start a new run with another "
            "name=..."
        )
    return None


def removed_meanwhile(path: Path) -> str | None:
    """Return the message for a checkpoint that vanished while it was read; None if it still exists."""
    return None if path.exists() else f"{path}: was removed while it was read, by a run that trains"


def find(folder: CheckpointFolder, step: int) -> CheckpointHandle:
    """Return the checkpoint of one step, verified by this process alone; a CheckpointError if missing or damaged."""
    path = folder.of_step(folder.resolve_step(step))
    try:
        return CheckpointHandle(path=path, manifest=folder.check(step))
    except CheckpointError as error:
        raise CheckpointError(removed_meanwhile(path) or str(error)) from None


def _check(folder: CheckpointFolder, step: int, group: Group) -> CheckpointHandle | str:
    """Verify a checkpoint, each rank a share of its files; return it, or its first defect, on every rank."""
    path, defect, manifest = folder.of_step(step), None, None
    try:
        manifest = folder.manifest(step)
        for name in sorted(manifest.files)[group.index :: group.size]:
            check_file(path, name, manifest.files[name])
            check_finite_values(path, [name])
    except (CheckpointError, ResourceError) as error:
        defect = error
    fault_injection.hit("resume.checked")
    found = error_to_wire(defect), None if manifest is None else manifest.sha256
    wait_for_all(group)
    reports = [] if group.agrees(found) and defect is None else group.all_gather_objects(found)
    reports = [(error_from_wire(error), sha256) for error, sha256 in reports]
    for rank, (error, _) in enumerate(reports):
        if isinstance(error, UnsupportedFormat | ResourceError):
            raise type(error)(f"{f'rank {group.ranks[rank]}: ' if group.size > 1 else ''}{error}")
    damage = [str(error) for error, _ in reports if error is not None]
    if damage:
        return removed_meanwhile(path) or damage[0]
    other = [group.ranks[rank] for rank, (_, sha256) in enumerate(reports) if sha256 != reports[0][1]]
    if other:
        raise CheckpointError(
            f"{path}: is another checkpoint on {format_ranks(other)} than on rank {group.ranks[0]}; set runs_dir to a "
            "file system that all nodes share, and keep one of them"
        )
    assert manifest is not None
    folder.mark_intact(step)
    return CheckpointHandle(path=path, manifest=manifest)
