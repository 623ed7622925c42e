"""A branch: a new run that goes on from a checkpoint of another one, in a folder and with an id of its own.

Everything is copied, so that whatever becomes of one run leaves the other alone; a file system that shares blocks
between copies (XFS, Btrfs, NFS 4.2) makes the copy of a checkpoint free. Imports no torch.
"""

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from secrets import token_hex
from typing import Any, Final

from trainer import fault_injection
from trainer.atomic_io import NotRegular, copy_file, sync_files, sync_folder
from trainer.checkpoint.checkpoint_folder import CheckpointFolder
from trainer.checkpoint.identity import Parent, recorded_id, recorded_name, recorded_parent, write_identity
from trainer.checkpoint.manifest import MANIFEST, Manifest
from trainer.checkpoint.manifest_file import manifest_text
from trainer.checkpoint.new_folder import check_nothing_is_at, new_folder
from trainer.checkpoint.run_folder import RunFolder
from trainer.config.nodes import shown_path
from trainer.errors import CheckpointError
from trainer.metrics.log_content import LogContent

_log = logging.getLogger(__name__)
_TOKENIZER: Final = ("tokenizer*", "special_tokens_map.json", "chat_template*", "vocab.*", "merges.txt")
"""Small files that a run needs besides its checkpoint; what it measured and drew is not copied."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch:
    """A new run to be made from a checkpoint of another one."""

    parent: RunFolder
    step: int | None
    """Step of the checkpoint; None: the newest intact one."""
    name: str
    config: str
    """YAML of the new run."""

    def check(self, final: Path) -> None:
        """Check that the run can be made at `final`, as far as that takes no time.

        Raises:
            ConfigError: if there is something at `final`.
            CheckpointError: if the parent does not have the checkpoint.
        """
        CheckpointFolder(self.parent.checkpoints).resolve_step(self.step)
        check_nothing_is_at(final)

    def is_made(self, final: Path) -> bool:
        """Return whether there is a branch of this parent at `final`: the work of an earlier attempt."""
        made = recorded_parent(RunFolder(final))
        return made is not None and made.id == recorded_id(self.parent) and self.step in (None, made.step)

    def make(self, final: Path) -> Parent:
        """Write the folder of the run, with a verified copy of the checkpoint, and return its parent.

        After an error, or a kill, there is nothing at `final`.

        Raises:
            ConfigError: if there is something at `final`, or another process is writing it.
            CheckpointError: if the parent has no such checkpoint, or it is damaged.
            ResourceError: if the disk refuses.
        """
        self.check(final)
        with new_folder(final) as folder:
            manifest = self._copy_checkpoint(folder)
            fault_injection.hit("branch.checkpoint_copied")
            run_id = token_hex(8)
            parent_id = recorded_id(self.parent) or _text(manifest.run.get("id")) or ""
            parent_name = recorded_name(manifest.run) or self.parent.path.name
            place = str(self.parent.path.absolute())
            parent = Parent(id=parent_id, name=parent_name, step=manifest.step, folder=place)
            self._write_manifest(folder, manifest, {"id": run_id, "parent": asdict(parent)})
            _copy_log(self.parent.metrics, folder.metrics, manifest, "metrics")
            _copy_log(self.parent.routing, folder.routing, manifest, "routing")
            _copy_log(self.parent.alarms, folder.alarms, manifest, "alarms")
            self._copy_small_files(folder)
            self._write_small_files(folder, run_id=run_id, parent=parent)
            fault_injection.hit("branch.written")
        return parent

    def _copy_checkpoint(self, folder: RunFolder) -> Manifest:
        """Copy the checkpoint and verify the copy; of damaged ones the next older is taken, unless a step is named."""
        source, copies = CheckpointFolder(self.parent.checkpoints), CheckpointFolder(folder.checkpoints)
        damage: list[str] = []
        while True:
            steps = [step for step in source.steps() if not copies.of_step(step).exists()]
            if damage and (self.step is not None or not steps):
                raise CheckpointError("; ".join(damage))
            step = source.resolve_step(self.step) if self.step is not None else max(steps, default=None)
            if step is None:
                raise CheckpointError(f"{source.path}: has no checkpoint; train first")
            try:
                manifest = _copy_files(source, copies, step)
            except CheckpointError as error:
                damage.append(str(error))
                continue
            for line in damage:
                _log.warning("%s; using step %s instead", line, step)
            for other in copies.steps():
                if other != step:
                    shutil.rmtree(copies.of_step(other))
            return manifest

    def _write_manifest(self, folder: RunFolder, manifest: Manifest, ours: Mapping[str, Any]) -> None:
        """Make the record of the run in the copied checkpoint the new run's."""
        config = manifest.run.get("config")
        renamed = {"config": {**config, "name": self.name}} if isinstance(config, dict) else {}
        own = manifest.model_copy(update={"run": {**manifest.run, **renamed, **ours}})
        path = CheckpointFolder(folder.checkpoints).of_step(manifest.step)
        (path / MANIFEST).write_bytes(manifest_text(own))
        sync_files([entry for entry in path.iterdir() if entry.is_file()])
        sync_folder(path)
        sync_folder(path.parent)

    def _copy_small_files(self, folder: RunFolder) -> None:
        for pattern in _TOKENIZER:
            for path in self.parent.path.glob(pattern):
                _copy_regular(path, folder.path / path.name)
        if self.parent.source.is_dir():
            folder.source.mkdir()
            for path in self.parent.source.iterdir():
                _copy_regular(path, folder.source / path.name)

    def _write_small_files(self, folder: RunFolder, *, run_id: str, parent: Parent) -> None:
        made_from = {"command": "branch", "parents": [asdict(parent)]}
        write_identity(folder, run_id=run_id, name=self.name, parent=parent)
        folder.write(folder.made_from, json.dumps(made_from) + "\n")
        folder.write_environment({})
        folder.write(folder.config, self.config)


def _copy_files(source: CheckpointFolder, copies: CheckpointFolder, step: int) -> Manifest:
    """Copy one checkpoint and compare every byte of the copy with the hashes; raise an error about the original."""
    there, here = source.of_step(step), copies.of_step(step)
    here.mkdir(parents=True)
    manifest = source.manifest(step)
    try:
        for name in (*manifest.files, MANIFEST):
            copy_file(there / name, here / name)
    except (FileNotFoundError, NotRegular) as error:
        damage = f"{shown_path(error.filename)}: is damaged (there is no such file, or it is not a regular one)"
        removed = f"{there}: was removed while it was copied, by a run that trains"
        raise CheckpointError(damage if there.exists() else removed) from None
    defect = copies.defect(step)
    if defect is not None:
        raise CheckpointError(source.defect(step) or defect)
    return manifest


def _copy_log(source: Path, target: Path, manifest: Manifest, kind: str) -> None:
    """Copy a log up to what it had when the checkpoint was saved; the new run begins its log if that is not known."""
    logs = manifest.run.get("logs")
    content = LogContent.from_record(logs.get(kind)) if isinstance(logs, dict) else None
    if content is not None and source.is_file() and not source.is_symlink():
        copy_file(source, target, size_bytes=content.size_bytes)


def _copy_regular(source: Path, target: Path) -> None:
    if source.is_file() and not source.is_symlink():
        copy_file(source, target)


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None
