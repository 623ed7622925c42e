"""Checkpoints of one run on disk: names, atomic commit, verification and pruning. Imports no torch.

checkpoints/
  step_00000500/            complete: renamed to this last
  .tmp-step_00000750/       being written, or left by a killed run and removed at the next start
  .trash-step_00000250/     being removed
"""

import logging
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path

from trainer import fault_injection
from trainer.atomic_io import sync_folder
from trainer.checkpoint.best import BestCheckpoint
from trainer.checkpoint.file_integrity import check_file
from trainer.checkpoint.manifest import Manifest, UnsupportedFormat
from trainer.checkpoint.manifest_file import read_manifest
from trainer.checkpoint.safetensors_file import check_finite_values
from trainer.errors import CheckpointError, ResourceError

_NAME = re.compile(r"step_([0-9]{8,18})")
_LEFT = re.compile(r"\.(tmp|trash)-step_[0-9]{8,18}")
_log = logging.getLogger(__name__)

Signature = tuple[tuple[str, int, int], ...]
"""Name, size in bytes and mtime in ns of each file of a checkpoint."""


def step_in_name(name: str) -> int | None:
    """Return the step of a checkpoint by the name of its folder; None if that is not one's."""
    match = _NAME.fullmatch(name)
    return None if match is None else int(match[1])


class CheckpointFolder:
    """The checkpoints of one run; the folder need not exist.

    Pruning keeps the `keep` newest intact checkpoints, and those of steps that are a multiple of `keep_every`.
    """

    def __init__(self, path: Path, *, keep: int = 3, keep_every: int | None = None) -> None:
        self.path, self.keep, self.keep_every = path, keep, keep_every
        self._verified: dict[int, tuple[Signature, str | None]] = {}

    def steps(self) -> list[int]:
        """Return the steps that have a checkpoint, oldest first by the number in the name, not by time."""
        if not self.path.is_dir():
            return []
        steps = {step for entry in self.path.iterdir() if (step := step_in_name(entry.name)) is not None}
        return sorted(step for step in steps if self.of_step(step).is_dir() and not self.of_step(step).is_symlink())

    def of_step(self, step: int) -> Path:
        """Return the folder of a step's checkpoint."""
        return self.path / f"step_{step:08d}"

    def resolve_step(self, step: int | None) -> int:
        """Return `step`, or the newest step for None.

        Raises:
            CheckpointError: if it has no checkpoint.
        """
        steps = self.steps()
        if not steps:
            raise CheckpointError(f"{self.path}: has no checkpoint; train first")
        if step is not None and step not in steps:
            raise CheckpointError(f"{self.path}: has no checkpoint of step {step}; it has {', '.join(map(str, steps))}")
        return steps[-1] if step is None else step

    def temporary(self, step: int) -> Path:
        """Return the folder that a step's checkpoint is written into before it is committed."""
        return self.path / f".tmp-step_{step:08d}"

    def begin(self, step: int) -> None:
        """Create the empty folder that a checkpoint is written into."""
        temporary = self.temporary(step)
        if not self.path.is_dir():
            self.path.mkdir(parents=True, exist_ok=True)
            sync_folder(self.path.parent)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        fault_injection.hit("save.folder_made")

    def commit(self, step: int) -> Path:
        """Rename the temporary folder, whose files are flushed: from now on it is a checkpoint."""
        temporary, final = self.temporary(step), self.of_step(step)
        sync_folder(temporary)
        fault_injection.hit("save.folder_synced")
        if os.path.lexists(final):  # damaged, so this run did not resume from it, or not a folder at all
            self.remove(step)
        fault_injection.hit("save.before_rename")
        temporary.rename(final)
        fault_injection.hit("save.renamed")
        sync_folder(self.path)
        self.mark_intact(step)
        fault_injection.hit("save.committed")
        return final

    def abandon(self, step: int) -> None:
        """Remove the temporary folder of a save that failed."""
        shutil.rmtree(self.temporary(step), ignore_errors=True)

    def leftovers(self) -> list[Path]:
        """Return what a killed run left half-written or half-removed; in a live run, also the save in progress."""
        if not self.path.is_dir():
            return []
        return sorted(entry for entry in self.path.iterdir() if _LEFT.fullmatch(entry.name))

    def clean(self) -> None:
        """Remove the leftovers of a killed run. The caller must hold the run's lock."""
        for entry in self.leftovers():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            else:  # not a folder, and in the way of a save
                with suppress(OSError):
                    entry.unlink()
        fault_injection.hit("resume.cleaned")

    def remove(self, step: int) -> None:
        """Rename a checkpoint before deleting its files, so that a kill never leaves half of one under its name."""
        trash = self.path / f".trash-step_{step:08d}"
        shutil.rmtree(trash, ignore_errors=True)
        self.of_step(step).rename(trash)
        fault_injection.hit("remove.out_of_sight")
        shutil.rmtree(trash, ignore_errors=True)
        fault_injection.hit("remove.done")

    def mark_intact(self, step: int) -> None:
        """Cache that a checkpoint was verified; valid until one of its files changes."""
        self._verified[step] = _signature(self.of_step(step)), None

    def manifest(self, step: int) -> Manifest:
        """Read only the manifest of a checkpoint.

        Raises:
            CheckpointError: if it is damaged or of another step.
            ResourceError: if it cannot be read now.
        """
        manifest = read_manifest(self.of_step(step))
        if manifest.step != step:
            raise CheckpointError(f"{self.of_step(step)}: is damaged (its manifest is of step {manifest.step})")
        return manifest

    def is_whole(self, step: int) -> bool:
        """Return whether a checkpoint is there with all of its files, by their sizes; unreadable for now, it may be."""
        try:
            for name, stated in self.manifest(step).files.items():
                check_file(self.of_step(step), name, stated, with_content=False)
        except (UnsupportedFormat, ResourceError):
            return True
        except CheckpointError:
            return False
        return True

    def check(self, step: int) -> Manifest:
        """Read a whole checkpoint and compare every byte with its hash; raises what `manifest` does."""
        manifest = self.manifest(step)
        for name, stated in manifest.files.items():
            check_file(self.of_step(step), name, stated)
        return manifest

    def defect(self, step: int) -> str | None:
        """Return why a checkpoint is not intact, or None if every byte is right and every value finite.

        The result is cached until one of the files changes.

        Raises:
            UnsupportedFormat: if another version wrote it, so this one cannot tell.
            ResourceError: if it cannot be read now.
        """
        signature = _signature(self.of_step(step))
        verified, reason = self._verified.get(step, (None, None))
        if verified == signature:
            return reason
        try:
            check_finite_values(self.of_step(step), self.check(step).files)
        except UnsupportedFormat:
            raise
        except CheckpointError as error:
            self._verified[step] = signature, str(error)
            return str(error)
        self.mark_intact(step)
        return None

    def is_intact(self, step: int) -> bool:
        """Return whether a checkpoint is intact; log once why it is not or cannot be verified now."""
        before = self._verified.get(step)
        try:
            reason = self.defect(step)
        except (UnsupportedFormat, ResourceError) as error:
            _log.warning("%s", error)
            return False
        if reason is not None and self._verified.get(step) != before:
            _log.warning("%s", reason)
        return reason is None

    def newest_intact(self) -> Path | None:
        """Return the newest intact checkpoint; None if there is none."""
        return next((self.of_step(step) for step in reversed(self.steps()) if self.is_intact(step)), None)

    def best(self, newest: int | None = None) -> BestCheckpoint | None:
        """Return the best checkpoint by the record of `newest`, or of the newest one that can be read."""
        for step in [newest] if newest is not None else reversed(self.steps()):
            with suppress(CheckpointError, ResourceError):
                return BestCheckpoint.of(self.manifest(step).run)
        return None

    def outdated(self, *, newest: int) -> list[int]:
        """Return the steps to remove once `newest` is saved.

        An earlier checkpoint goes if `keep` intact ones are newer and neither `keep_every` keeps it nor `newest`, in
        whose record it is the best. A later one, left
        by a run that then resumed from an earlier step, goes only if it is damaged. If intact, it stays without
        counting towards `keep`: it would push out the checkpoints that this run descends from.
        """
        steps, best = self.steps(), self.best(newest)
        kept = None if best is None else best.step
        earlier = [step for step in steps if step <= newest]
        to_remove = []
        for step in (step for step in steps if step > newest):
            with suppress(UnsupportedFormat, ResourceError):  # not known to be damaged
                if self.defect(step) is not None:
                    to_remove.append(step)
        if len(earlier) <= self.keep:
            return to_remove
        num_intact = 0
        for step in reversed(earlier):
            if num_intact < self.keep:
                num_intact += self.is_intact(step)
            elif step != kept and (self.keep_every is None or step % self.keep_every):
                to_remove.append(step)
        return sorted(to_remove)

    def prune(self, *, newest: int) -> None:
        """Remove outdated checkpoints; log a warning and leave those that cannot be read or removed."""
        fault_injection.hit("prune.begin")
        try:
            for step in self.outdated(newest=newest):
                try:
                    self.remove(step)
                except OSError as error:
                    _log.warning("%s: cannot be removed: %s", self.of_step(step), error.strerror)
        except OSError as error:
            _log.warning("%s: cannot be read: %s", self.path, error.strerror)
        fault_injection.hit("prune.done")


def _signature(folder: Path) -> Signature:
    try:
        with os.scandir(folder) as entries:
            return tuple(sorted((entry.name, entry.stat().st_size, entry.stat().st_mtime_ns) for entry in entries))
    except OSError:
        return ()
