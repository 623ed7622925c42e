"""Which checkpoints there are: saved whole or not at all, the newest undamaged one found again, old ones removed."""

import errno
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.checkpoint.format import read_checkpoint, read_manifest, write_checkpoint
from trainer.checkpoint.state import TrainState
from trainer.durable import sync_folder
from trainer.errors import CheckpointError, ResourceError

_NAME = re.compile(r"step_(\d{8,})")
_log = logging.getLogger(__name__)
_OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A checkpoint that was read and checked."""

    path: Path
    state: TrainState
    info: dict[str, Any]
    """The manifest: step, position and what describes the run."""


class Checkpointer:
    """The checkpoints of one run folder."""

    def __init__(self, folder: Path, *, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def steps(self) -> list[int]:
        """Return the steps that have a checkpoint, oldest first; the number in the name counts, never a time stamp."""
        if not self.folder.is_dir():
            return []
        matches = (_NAME.fullmatch(entry.name) for entry in self.folder.iterdir() if entry.is_dir())
        return sorted(int(match[1]) for match in matches if match)

    def path(self, step: int) -> Path:
        """Return the folder of a step's checkpoint."""
        return self.folder / f"step_{step:08d}"

    def save(self, step: int, state: TrainState, info: Mapping[str, Any]) -> Path:
        """Write a checkpoint beside its final name, rename it, then remove those beyond `keep`.

        Raises:
            ResourceError: if the disk is full. Nothing half-written stays, and no older checkpoint was touched.
            CheckpointError: if the folder cannot be written for another reason.
        """
        final, temporary = self.path(step), self.folder / f".tmp-step_{step:08d}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            write_checkpoint(temporary, state, {"step": step, **info})
            if final.exists():  # a damaged one that this run was not resumed from
                self._remove(final)
            temporary.rename(final)
            sync_folder(self.folder)
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise self._explain(step, state, error) from None
        self._remove_outdated(step)
        return final

    def load_newest(self, *, warn: Callable[[str], None]) -> Loaded | None:
        """Return the newest undamaged checkpoint, or None if there is none at all.

        Args:
            warn: called with one line for each damaged checkpoint that was passed over.

        Raises:
            CheckpointError: if there are checkpoints and every one is damaged; a run never starts over silently.
        """
        rejected: list[str] = []
        for step in reversed(self.steps()):
            try:
                loaded = self.load(step)
            except CheckpointError as error:
                rejected.append(str(error))
                continue
            for reason in rejected:
                warn(f"{reason}; resuming from step {step} instead")
            return loaded
        if rejected:
            raise CheckpointError(
                f"{'; '.join(rejected)}; no other checkpoint is left: "
                "restore the file, or start a new run with name=..."
            )
        return None

    def load(self, step: int) -> Loaded:
        """Return the checkpoint of one step.

        Raises:
            CheckpointError: if it is missing or damaged.
        """
        path = self.path(step)
        if not path.is_dir():
            have = ", ".join(map(str, self.steps())) or "none"
            raise CheckpointError(f"{self.folder}: has no checkpoint of step {step}; it has {have}")
        manifest = read_manifest(path)
        return Loaded(path=path, state=read_checkpoint(path, manifest), info=manifest)

    def clean(self) -> None:
        """Remove what a killed run left half-written or half-removed. Only for who holds the run's lock."""
        if self.folder.is_dir():
            for entry in self.folder.iterdir():
                if entry.name.startswith((".tmp-", ".trash-")):
                    shutil.rmtree(entry, ignore_errors=True)

    def _remove_outdated(self, step: int) -> None:
        """Remove checkpoints that this run did not come from (of later steps), and those beyond `keep`.

        Were a later, damaged one left, it would be counted as one of the newest and `step` itself removed.
        """
        later = [other for other in self.steps() if other > step]
        earlier = [other for other in self.steps() if other <= step]
        for outdated in later + earlier[: -self.keep]:
            try:
                self._remove(self.path(outdated))
            except OSError as error:  # the new one is safe, and an old one more does no harm
                _log.warning("%s: cannot be removed: %s", self.path(outdated), error.strerror)

    def _remove(self, path: Path) -> None:
        """Take a checkpoint out of sight in one move before its files go, so that a kill leaves no half of it."""
        trash = self.folder / f".trash-{path.name}"
        shutil.rmtree(trash, ignore_errors=True)
        path.rename(trash)
        shutil.rmtree(trash, ignore_errors=True)

    def _explain(self, step: int, state: TrainState, error: OSError) -> ResourceError | CheckpointError:
        if error.errno not in _OUT_OF_SPACE:
            return CheckpointError(f"{self.folder}: step {step} not saved: {error.strerror or error}")
        needed = sum(part.tensor.numel() * part.tensor.element_size() for part in state.slices.values())
        existing = next(folder for folder in (self.folder, *self.folder.parents) if folder.exists())
        free = os.statvfs(existing)
        free_mb = free.f_bavail * free.f_frsize / 1e6
        return ResourceError(
            f"{self.folder}: step {step} not saved: {error.strerror} "
            f"(it needs {needed / 1e6:.0f} MB, {free_mb:.0f} MB are free); "
            "earlier checkpoints are intact: make room and start the run again"
        )
