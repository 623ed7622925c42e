"""Run id, also used by wandb: a resumed run keeps it, a branch of another run gets a new one. Imports no torch.

    run_id         the id, on one line
    origin.json    {"id", "name", "folder", "parent": null or {"id", "name", "step", "folder"}}

A folder that was moved or renamed is the same run; a copy is a branch. A copied folder is recognised if the original
still exists with the same id, copied checkpoints by the name and id that they record.
"""

import json
import os
import re
import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainer.atomic_io import open_regular
from trainer.checkpoint.run_folder import RunFolder
from trainer.config.nodes import shown

_ID = re.compile(r"[0-9a-z]{8,64}")
_MAX_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Parent:
    """The run that this one branched off from."""

    id: str
    name: str | None
    step: int
    folder: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Identity of the run in a folder."""

    id: str
    parent: Parent | None
    said: str | None
    """Message to the user if the run has just branched off."""


def identify(folder: RunFolder, *, name: str, found: Mapping[str, Any] | None = None, step: int = 0) -> Identity:
    """Return the identity of the run in a locked folder, and record it there.

    `found` is the record of the run in the checkpoint that it resumes from, and `step` that of the checkpoint.

    Raises:
        ResourceError: if the disk refuses.
    """
    origin, kept = read_record(folder.origin), recorded_id(folder)
    found = {} if found is None else found
    saved_id, saved_name = _id(found.get("id")), recorded_name(found)
    parent = recorded_parent(folder)
    copied_from = None if kept is None else _copied_from(folder, kept, origin, saved_name)
    # Until a branch has saved, its newest checkpoint is its parent's.
    is_foreign = saved_id not in (None, kept, None if parent is None else parent.id)
    has_copied_checkpoints = is_foreign and (kept is not None or saved_name not in (None, name))
    if copied_from is None and not has_copied_checkpoints:
        if kept is None:  # new, or its run_id was removed
            parent = parent_from_record(found.get("parent"))
        identity = Identity(id=kept or saved_id or secrets.token_hex(8), parent=parent, said=None)
    else:
        parent_id = (saved_id if has_copied_checkpoints else kept) or ""
        parent_name, copied = _text(saved_name or origin.get("name")), None if copied_from is None else str(copied_from)
        parent = Parent(id=parent_id, name=parent_name, step=step, folder=copied)
        run_id, called = secrets.token_hex(8), "" if parent_name is None else f"{shown(parent_name)}, "
        said = f"branches off from run {parent_id} ({called}step {step}): a run of its own from here, {run_id}"
        identity = Identity(id=run_id, parent=parent, said=f"{folder.path}: {said}")
    write_identity(folder, run_id=identity.id, name=name, parent=identity.parent)
    return identity


def write_identity(folder: RunFolder, *, run_id: str, name: str, parent: Parent | None) -> None:
    """Write the id of a run into its folder, and what it was made from."""
    # The id first: a run killed in between branches off again, and is never mistaken for its parent.
    folder.write_unless_same(folder.run_id, f"{run_id}\n")
    of = None if parent is None else asdict(parent)
    origin = {"id": run_id, "name": name, "folder": str(folder.place.absolute()), "parent": of}
    folder.write_unless_same(folder.origin, json.dumps(origin, indent=1) + "\n")


def recorded_id(folder: RunFolder) -> str | None:
    """Return the id in a run folder; None if it has none."""
    return _id(_read(folder.run_id, 100).strip())


def recorded_parent(folder: RunFolder) -> Parent | None:
    """Return the run that the one in a folder was made from; None if there is none, or its record is of another run."""
    origin = read_record(folder.origin)
    return parent_from_record(origin.get("parent")) if origin.get("id") == recorded_id(folder) else None


def _copied_from(folder: RunFolder, kept: str, origin: Mapping[str, Any], saved_name: str | None) -> Path | None:
    """Return the folder that this one is a copy of, which still exists with the same id; None if it is not a copy."""
    former = origin.get("folder")
    if not isinstance(former, str):  # written by a version that did not record its folder
        if saved_name is None:
            return None
        former = folder.path.parent / saved_name
    path = Path(former)
    with suppress(OSError, ValueError):
        # The same folder: the run was started in it before, even if its run_id was edited since.
        if not path.samefile(folder.path) and recorded_id(RunFolder(path)) == kept:
            return path
    return None


def read_record(path: Path) -> dict[str, Any]:
    """Return the JSON values of a small file of a run folder; none if it is missing or damaged."""
    with suppress(ValueError, RecursionError):
        values = json.loads(_read(path, _MAX_BYTES))
        return values if isinstance(values, dict) else {}
    return {}


def _read(path: Path, max_characters: int) -> str:
    with suppress(OSError, ValueError), os.fdopen(open_regular(path, os.O_RDONLY), encoding="utf-8") as file:
        return file.read(max_characters)
    return ""


def parent_in(run: Mapping[str, Any], *, name: str | None, step: int, folder: Path | None) -> Parent | None:
    """Return the parent of a run that is made from a checkpoint, by the checkpoint's record; None if that has no id."""
    run_id = run.get("id")
    if not isinstance(run_id, str) or not run_id:
        return None
    return Parent(id=run_id, name=name, step=step, folder=None if folder is None else str(folder.absolute()))


def recorded_name(run: Mapping[str, Any]) -> str | None:
    """Return the name of the run in a checkpoint's record; None if it has none."""
    config = run.get("config")
    name = config.get("name") if isinstance(config, Mapping) else None
    return name if isinstance(name, str) else None


def parent_from_record(value: object) -> Parent | None:
    """Return the parent that JSON values describe; None if they are not valid."""
    if not isinstance(value, Mapping):
        return None
    of, step = _id(value.get("id")), value.get("step")
    if of is None or type(step) is not int or step < 0:
        return None
    return Parent(id=of, name=_text(value.get("name")), step=step, folder=_text(value.get("folder")))


def _id(value: object) -> str | None:
    return value if isinstance(value, str) and _ID.fullmatch(value) else None


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and 0 < len(value) <= 1000 and value.isprintable() else None
