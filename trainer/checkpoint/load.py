"""Resuming: the newest checkpoint whose every byte is what was written, checked by all ranks together."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer import faults
from trainer.checkpoint.folder import CheckpointFolder
from trainer.checkpoint.manifest import Manifest, check_file
from trainer.distributed.collectives import Group
from trainer.distributed.together import meet
from trainer.errors import CheckpointError


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A checkpoint whose files were checked."""

    path: Path
    manifest: Manifest

    @property
    def step(self) -> int:
        """Completed steps."""
        return self.manifest.step

    @property
    def run(self) -> Mapping[str, Any]:
        """What describes the run."""
        return self.manifest.run


def find_newest(folder: CheckpointFolder, group: Group, *, warn: Callable[[str], None]) -> Found | None:
    """Return the newest undamaged checkpoint, or None if there is none at all; the same one on every rank.

    Args:
        folder: of the run; what rank 0 sees in it counts.
        group: all ranks; every one must call it.
        warn: called with one line for each damaged checkpoint that was passed over.

    Raises:
        CheckpointError: if there are checkpoints and every one is damaged; a run never starts over silently.
    """
    rejected: list[str] = []
    for step in reversed(group.gather_objects(folder.steps() if group.index == 0 else None)[0]):
        faults.hit("resume.candidate")
        found = _check(folder, step, group)
        if isinstance(found, str):
            rejected.append(found)
            continue
        for reason in rejected:
            warn(f"{reason}; resuming from step {step} instead")
        return found
    if rejected:
        raise CheckpointError(
            f"{'; '.join(rejected)}; no other checkpoint is left: restore the file, or start a new run with name=..."
        )
    return None


def find(folder: CheckpointFolder, step: int) -> Found:
    """Return the checkpoint of one step, checked by this process alone.

    Raises:
        CheckpointError: if it is missing or damaged.
    """
    return Found(path=folder.of_step(step), manifest=folder.check(folder.existing(step)))


def _check(folder: CheckpointFolder, step: int, group: Group) -> Found | str:
    """Check a checkpoint, each rank some of its files; return what is wrong with it, on every rank, if anything is."""
    path, wrong, manifest = folder.of_step(step), None, None
    try:
        manifest = folder.manifest(step)
        for name in sorted(manifest.files)[group.index :: group.size]:
            check_file(path, name, manifest.files[name])
    except CheckpointError as error:
        wrong = str(error)
    faults.hit("resume.checked")
    said = [reason for reason in meet(group, wrong) if reason is not None]
    if said:
        return said[0]
    assert manifest is not None
    folder.note_sound(step)
    return Found(path=path, manifest=manifest)
