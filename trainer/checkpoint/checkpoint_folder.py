"""The checkpoints of one run on disk: their names, how one gets its name, which of them stay. Imports no torch.

checkpoints/
  step_00000500/            whole: the name is given last
  .tmp-step_00000750/       being written, or left by a killed run: removed at the next start
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
from trainer.checkpoint.file_integrity import check_file
from trainer.checkpoint.manifest import Manifest, UnsupportedFormat
from trainer.checkpoint.manifest_file import read_manifest
from trainer.checkpoint.safetensors_file import check_finite_values
from trainer.errors import CheckpointError, ResourceError

_NAME = re.compile(r"step_([0-9]{8,18})")
_LEFT = re.compile(r"\.(tmp|trash)-step_[0-9]{8,18}")
_log = logging.getLogger(__name__)

Signature = tuple[tuple[str, int, int], ...]
"""Name, size and time of the last change of every file of a checkpoint."""


class CheckpointFolder:
    """The checkpoints of one run."""

    def __init__(self, path: Path, *, keep: int = 3, keep_every: int | None = None) -> None:
        """Describe the folder, which need not exist.

        Args:
            path: of it.
            keep: newest sound checkpoints to keep.
            keep_every: checkpoints of steps that are a multiple of this stay for ever.
        """
        self.path, self.keep, self.keep_every = path, keep, keep_every
        self._checked: dict[int, tuple[Signature, str | None]] = {}

    def steps(self) -> list[int]:
        """Return the steps that have a checkpoint, oldest first; the number in the name counts, never a time stamp."""
        if not self.path.is_dir():
            return []
        entries = [entry for entry in self.path.iterdir() if entry.is_dir() and not entry.is_symlink()]
        steps = {int(match[1]) for match in (_NAME.fullmatch(entry.name) for entry in entries) if match}
        return sorted(step for step in steps if self.of_step(step).is_dir())

    def of_step(self, step: int) -> Path:
        """Return the folder of a step's checkpoint."""
        return self.path / f"step_{step:08d}"

    def resolve_step(self, step: int | None) -> int:
        """Return the step if it has a checkpoint, the newest one by default.

        Raises:
            CheckpointError: if there is none.
        """
        steps = self.steps()
        if not steps:
            raise CheckpointError(f"{self.path}: has no checkpoint; train first")
        if step is not None and step not in steps:
            have = ", ".join(map(str, steps))
            raise CheckpointError(f"{self.path}: has no checkpoint of step {step}; it has {have}")
        return steps[-1] if step is None else step

    def temporary(self, step: int) -> Path:
        """Return where a step's checkpoint is written before it has its name."""
        return self.path / f".tmp-step_{step:08d}"

    def begin(self, step: int) -> None:
        """Make the empty folder that a checkpoint is written into.

        Raises:
            OSError: if the disk refuses.
        """
        temporary = self.temporary(step)
        if not self.path.is_dir():
            self.path.mkdir(parents=True, exist_ok=True)
            sync_folder(self.path.parent)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        fault_injection.hit("save.folder_made")

    def commit(self, step: int) -> Path:
        """Give what was written and flushed its name: from here on it is a checkpoint.

        Raises:
            OSError: if the disk refuses.
        """
        temporary, final = self.temporary(step), self.of_step(step)
        sync_folder(temporary)
        fault_injection.hit("save.folder_synced")
        if os.path.lexists(final):  # a damaged one that this run was not resumed from, or no folder at all
            self.remove(step)
        fault_injection.hit("save.before_rename")
        temporary.rename(final)
        fault_injection.hit("save.renamed")
        sync_folder(self.path)
        self.mark_intact(step)
        fault_injection.hit("save.committed")
        return final

    def abandon(self, step: int) -> None:
        """Remove what was written so far."""
        shutil.rmtree(self.temporary(step), ignore_errors=True)

    def leftovers(self) -> list[Path]:
        """Return what a killed run left half-written or half-removed; beside a running one also what it is writing."""
        if not self.path.is_dir():
            return []
        return sorted(entry for entry in self.path.iterdir() if _LEFT.fullmatch(entry.name))

    def clean(self) -> None:
        """Remove what a killed run left half-written or half-removed. Only for who holds the run's lock."""
        for entry in self.leftovers():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            else:  # no folder, and in the way of a save
                with suppress(OSError):
                    entry.unlink()
        fault_injection.hit("resume.cleaned")

    def remove(self, step: int) -> None:
        """Take a checkpoint out of sight in one move before its files go, so that a kill leaves no half of it.

        Raises:
            OSError: if it cannot be moved.
        """
        trash = self.path / f".trash-step_{step:08d}"
        shutil.rmtree(trash, ignore_errors=True)
        self.of_step(step).rename(trash)
        fault_injection.hit("remove.out_of_sight")
        shutil.rmtree(trash, ignore_errors=True)
        fault_injection.hit("remove.done")

    def mark_intact(self, step: int) -> None:
        """Remember that a checkpoint was checked and found sound, as long as nobody touches it."""
        self._checked[step] = _signature(self.of_step(step)), None

    def manifest(self, step: int) -> Manifest:
        """Read a checkpoint's manifest and no other file.

        Raises:
            CheckpointError: if it is damaged, or of another step.
            ResourceError: if it cannot be read now.
        """
        folder = self.of_step(step)
        manifest = read_manifest(folder)
        if manifest.step != step:
            raise CheckpointError(f"{folder}: is damaged (its manifest is of step {manifest.step})")
        return manifest

    def check(self, step: int) -> Manifest:
        """Read all of a checkpoint, and see that its bytes are those that were written.

        Raises:
            CheckpointError: if it is damaged.
            ResourceError: if it cannot be read now.
        """
        manifest = self.manifest(step)
        for name, stated in manifest.files.items():
            check_file(self.of_step(step), name, stated)
        return manifest

    def defect(self, step: int) -> str | None:
        """Return why a checkpoint is not sound, or None; one that was checked and not touched since is not read again.

        Those of which this returns None are whole to the last byte, and every number in them is finite.

        Raises:
            UnsupportedFormat: if another version wrote it: this one cannot tell.
            ResourceError: if it cannot be read now.
        """
        signature = _signature(self.of_step(step))
        checked, reason = self._checked.get(step, (None, None))
        if checked == signature:
            return reason
        try:
            check_finite_values(self.of_step(step), self.check(step).files)
        except UnsupportedFormat:
            raise
        except CheckpointError as error:
            self._checked[step] = signature, str(error)
            return str(error)
        self.mark_intact(step)
        return None

    def is_intact(self, step: int) -> bool:
        """Tell whether a checkpoint is sound, and log once why it is not, or that it cannot be told now."""
        known = self._checked.get(step)
        try:
            reason = self.defect(step)
        except (UnsupportedFormat, ResourceError) as error:
            _log.warning("%s", error)
            return False
        if reason is not None and self._checked.get(step) != known:
            _log.warning("%s", reason)
        return reason is None

    def newest_intact(self) -> Path | None:
        """Return the newest sound checkpoint; None if there is none."""
        return next((self.of_step(step) for step in reversed(self.steps()) if self.is_intact(step)), None)

    def outdated(self, *, newest: int) -> list[int]:
        """Return the steps that nobody needs any more, once `newest` is safe.

        Earlier ones when `keep` sound ones are newer, unless their turn of `keep_every` has come. Later ones only if
        they are damaged, which is why the run did not come from them. A sound later one stays and is not counted: it
        would push those out that the run came from.
        """
        steps = self.steps()
        earlier = [step for step in steps if step <= newest]
        found = [step for step in steps if step > newest and self._is_damaged(step)]
        if len(earlier) <= self.keep:
            return found
        num_sound = 0
        for step in reversed(earlier):
            if num_sound < self.keep:
                num_sound += self.is_intact(step)
            elif self.keep_every is None or step % self.keep_every:
                found.append(step)
        return sorted(found)

    def prune(self, *, newest: int) -> None:
        """Remove what is outdated. What cannot be read or removed stays, with a warning: it does no harm."""
        fault_injection.hit("prune.begin")
        try:
            outdated = self.outdated(newest=newest)
        except OSError as error:
            _log.warning("%s: cannot be read: %s", self.path, error.strerror)
            outdated = []
        for step in outdated:
            try:
                self.remove(step)
            except OSError as error:
                _log.warning("%s: cannot be removed: %s", self.of_step(step), error.strerror)
        fault_injection.hit("prune.done")

    def _is_damaged(self, step: int) -> bool:
        """Tell whether the bytes of a checkpoint are wrong; not so if that cannot be told."""
        with suppress(UnsupportedFormat, ResourceError):
            return self.defect(step) is not None
        return False


def _signature(folder: Path) -> Signature:
    try:
        with os.scandir(folder) as entries:
            found = [(entry.name, entry.stat().st_size, entry.stat().st_mtime_ns) for entry in entries]
    except OSError:
        return ()
    return tuple(sorted(found))
