"""Run id, as wandb knows a run: kept when the run resumes, a new one when another run branches off.

    run_id         the id: one line
    origin.json    {"id", "name", "folder", "parent": null or {"id", "name", "step", "folder"}}

A folder that was moved or renamed is the same run. A copy is another one: of a whole folder, as long as the one that it
was copied from is still there and has the same id, and of checkpoints, which say under what name and id they were made.
Imports no torch.
"""

import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainer.atomic_io import open_regular
from trainer.checkpoint.run_folder import RunFolder
from trainer.config.nodes import shown

_ID = re.compile(r"[0-9a-z]{8,64}")
_LONGEST_BYTES = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Parent:
    """The run that another one branched off from."""

    id: str
    name: str | None
    step: int
    """Completed steps of it that the new run goes on from."""
    folder: str | None
    """Folder that it was in, if known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Identity of the run in a folder."""

    id: str
    parent: Parent | None
    said: str | None
    """Message to the user about a run that has just branched off."""


def identify(folder: RunFolder, *, name: str, found: Mapping[str, Any] | None = None, step: int = 0) -> Identity:
    """Return which run a folder is, and write it down there.

    Args:
        folder: of the run, locked.
        name: of the experiment.
        found: what the checkpoint that it goes on from says of its run; None without one.
        step: of that checkpoint.

    Raises:
        ResourceError: if the disk refuses.
    """
    origin, kept = _read_origin(folder), _read_id(folder)
    found = {} if found is None else found
    known, trained_as = _id(found.get("id")), _trained_as(found)
    parent = _parent(origin.get("parent")) if origin.get("id") == kept else None
    copied_from = None if kept is None else _copied_from(folder, kept, origin, trained_as)
    # Before a branch has saved, its newest checkpoint is its parent's.
    is_strange = known not in (None, kept, None if parent is None else parent.id)
    is_graft = is_strange and (kept is not None or trained_as not in (None, name))
    if copied_from is None and not is_graft:
        if kept is None:  # the folder has forgotten it, or is new
            parent = _parent(found.get("parent"))
        identity = Identity(id=kept or known or secrets.token_hex(8), parent=parent, said=None)
    else:
        parent = Parent(
            id=(known if is_graft else kept) or "",
            name=_text(trained_as or origin.get("name")),
            step=step,
            folder=None if copied_from is None else str(copied_from),
        )
        identity = _branch(folder, parent)
    _write_down(folder, identity, name=name)
    return identity


def _branch(folder: RunFolder, parent: Parent) -> Identity:
    run_id, called = secrets.token_hex(8), "" if parent.name is None else f"{shown(parent.name)}, "
    where = f"branches off from run {parent.id} ({called}step {parent.step})"
    return Identity(id=run_id, parent=parent, said=f"{folder.path}: {where}: a run of its own from here, {run_id}")


def _write_down(folder: RunFolder, identity: Identity, *, name: str) -> None:
    """Write the id first: whoever is killed in between branches off once more, and is never taken for the parent."""
    folder.write_unless_same(folder.run_id, f"{identity.id}\n")
    parent = None if identity.parent is None else asdict(identity.parent)
    origin = {"id": identity.id, "name": name, "folder": str(folder.path.absolute()), "parent": parent}
    folder.write_unless_same(folder.origin, json.dumps(origin, indent=1) + "\n")


def _copied_from(folder: RunFolder, kept: str, origin: Mapping[str, Any], trained_as: str | None) -> Path | None:
    """Return the folder that this one is a copy of: it is still there, and has the same id."""
    for path in _places(folder, origin, trained_as):
        with suppress(OSError, ValueError):
            if path.samefile(folder.path):
                return None  # it was started here before, whatever somebody has made its id since
            if _read_id(RunFolder(path)) == kept:
                return path
    return None


def _places(folder: RunFolder, origin: Mapping[str, Any], trained_as: str | None) -> Iterator[Path]:
    """Yield where a run may have been before its folder came here."""
    if isinstance(origin.get("folder"), str):
        yield Path(origin["folder"])
    elif trained_as is not None:  # by a version that did not write it down
        yield folder.path.parent / trained_as


def _read_id(folder: RunFolder) -> str | None:
    return _id(_read(folder.run_id, 100).strip())


def _read_origin(folder: RunFolder) -> dict[str, Any]:
    with suppress(ValueError, RecursionError):
        origin = json.loads(_read(folder.origin, _LONGEST_BYTES))
        return origin if isinstance(origin, dict) else {}
    return {}


def _read(path: Path, most: int) -> str:
    """Return the beginning of a file that anybody may have put there; nothing of what is none."""
    with suppress(OSError, ValueError), os.fdopen(open_regular(path, os.O_RDONLY), encoding="utf-8") as file:
        return file.read(most)
    return ""


def _trained_as(found: Mapping[str, Any]) -> str | None:
    config = found.get("config")
    name = config.get("name") if isinstance(config, Mapping) else None
    return name if isinstance(name, str) else None


def _parent(value: object) -> Parent | None:
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
