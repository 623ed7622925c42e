"""The runs and published models that a run was made from, as far as their folders exist. Imports no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, TypeGuard

from trainer.checkpoint.identity import Parent, parent_from_record, read_record, recorded_id, recorded_parent
from trainer.checkpoint.run_folder import RunFolder

_MAX_DEPTH: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Ancestor:
    """A run, or a published model, that a run or its nearer ancestor was made from."""

    how: str
    """Way in which that was: branch, init_from, upcycle, import, surgery VERB; copy: of a folder or a checkpoint."""
    name: str
    step: int | None
    """Step of the checkpoint; None for a published model."""
    id: str | None
    beside: tuple[str, ...] = ()
    """Other runs that it was made from as well, as an average is."""

    @property
    def text(self) -> str:
        """Description in a few words, such as `base at step 300 (branch)`."""
        where = self.name if self.step is None else f"{self.name} at step {self.step}"
        return f"{' and '.join([where, *self.beside])} ({self.how})"

    def record(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)


def ancestors(folder: RunFolder, parent: Parent | None = None) -> list[Ancestor]:
    """Return the ancestors of the run in a folder, its parent first.

    The chain ends where a folder is gone, or is another run's by now. `parent` is used for a run that has not recorded
    its own yet.
    """
    found: list[Ancestor] = []
    while len(found) < _MAX_DEPTH:
        parent, made = recorded_parent(folder) or parent, read_record(folder.made_from)
        if parent is None:
            return [*found, *_published(made)]
        others = _parents(made)
        how = made.get("command") if parent.id in {other.id for other in others} else None
        found.append(
            Ancestor(
                how=how if _is_word(how) else "copy",
                name=parent.name or parent.id,
                step=parent.step,
                id=parent.id,
                beside=tuple(_at(other) for other in others if other != parent) if how is not None else (),
            )
        )
        next_folder = _folder_of(parent, folder)
        if next_folder is None:
            return found
        folder, parent = next_folder, None
    return found


def describe(chain: Sequence[Ancestor]) -> str:
    """Describe ancestors in one line, the nearest first."""
    return ", of ".join(one.text for one in chain)


def _parents(made: Mapping[str, Any]) -> list[Parent]:
    listed = made.get("parents")
    records = listed if isinstance(listed, list) else []
    return [parent for record in records if (parent := parent_from_record(record)) is not None]


def _published(made: Mapping[str, Any]) -> list[Ancestor]:
    """Return the published model that a run without a parent was made from, if any."""
    source, how = made.get("from"), made.get("command")
    if not isinstance(source, Mapping) or not _is_word(how):
        return []
    family, path = source.get("family"), source.get("folder")
    if not _is_word(family) or not isinstance(path, str) or not path.isprintable():
        return []
    return [Ancestor(how=how, name=f"{Path(path).name[:200]}, {family}", step=None, id=None)]


def _folder_of(parent: Parent, child: RunFolder) -> RunFolder | None:
    """Return the folder of a parent: where it was, or beside its child if both were moved."""
    beside = child.path.absolute().parent
    places = [Path(parent.folder)] if parent.folder is not None else []
    places += [beside / Path(name).name for name in (parent.folder, parent.name) if name is not None]
    return next((found for place in places if recorded_id(found := RunFolder(place)) == parent.id), None)


def _at(parent: Parent) -> str:
    return f"{parent.name or parent.id} at step {parent.step}"


def _is_word(value: object) -> TypeGuard[str]:
    return isinstance(value, str) and 0 < len(value) <= 100 and value.isprintable()
