"""Check that a run can resume from a checkpoint, before any tensor is copied."""

from collections.abc import Container, Iterable, Mapping, Set
from pathlib import Path
from typing import Any

from trainer.checkpoint.coverage import WEIGHT, is_average, is_moment, weight_of
from trainer.checkpoint.find_checkpoint import CheckpointHandle
from trainer.checkpoint.manifest import StoredTensor, run_record_problems
from trainer.checkpoint.state import TrainState
from trainer.config.dump import short
from trainer.config.nodes import dotted
from trainer.errors import CheckpointError


def check_fits(found: CheckpointHandle, mine: TrainState, *, elsewhere: Set[str] = frozenset()) -> None:
    """Compare names, shapes and dtypes of a checkpoint's tensors with those of this run's state.

    `elsewhere` names the weights and buffers of the model that only other ranks have.

    Raises:
        CheckpointError: with the first difference and the number of differences.
    """
    saved = found.manifest.tensors
    optional = set() if found.manifest.has_moments else {name for name in mine.slices if is_moment(name)}
    optional |= _state_of_one({name for name, stored in saved.items() if stored.is_frozen}, mine.slices, saved)
    optional |= _state_of_one({name for name, part in mine.slices.items() if part.is_frozen}, saved, mine.slices)
    averages = [set(filter(is_average, names)) for names in (saved, mine.slices)]
    if not all(averages):  # train.ema was turned on or off since; a part of them is never missing
        optional |= set.union(*averages)
    optional |= {name for name in saved if weight_of(name).removeprefix(WEIGHT) in elsewhere}
    names = sorted((saved.keys() | mine.slices.keys()) - optional)
    differences = [text for name in names if (text := _difference(name, saved.get(name), mine)) is not None]
    _refuse(found.path, differences)


def check_model(found: CheckpointHandle, model: Mapping[str, Any], *, stored: Mapping[str, Any] | None = None) -> None:
    """Compare the model config of a checkpoint with `model`, the current one as JSON values.

    `stored` is the checkpoint's with defaults for keys added since; None if this version cannot parse it, and then only
    the keys that it has are compared.

    Raises:
        CheckpointError: with the first key that differs, both values and the number of differences.
    """
    saved = found.run.get("config")
    before = saved.get("model") if isinstance(saved, Mapping) else None
    if not isinstance(before, Mapping):
        raise CheckpointError(f"{found.path}: does not say which model it is of (run.config.model); use another one")
    differences = [
        f"{key} is {short(old)} in it and {short(new)} in the config"
        for key, old, new in _changes("model", before if stored is None else stored, model)
    ]
    _refuse(found.path, differences)


def check_tokenizer(found: CheckpointHandle, *, fingerprint: str) -> None:
    """Raise a CheckpointError if tokenizers differ: under another one, the same ids mean different text."""
    saved = found.run.get("tokenizer_fingerprint")
    if saved != fingerprint:
        raise CheckpointError(
            f"{found.path}: was trained on another tokenizer than data.tokenizer gives now (fingerprint "
            f"{abridged(saved)}, now {abridged(fingerprint)}); restore its files, or use a new name=..."
        )


def check_record(found: CheckpointHandle) -> None:
    """Raise a CheckpointError if a checkpoint's record of its run is not complete enough to resume from."""
    for problem in run_record_problems(found.manifest):
        raise CheckpointError(f"{found.path}: is invalid: {problem}")


def abridged(fingerprint: object) -> str:
    """Return the first characters of a fingerprint from an untrusted file, safe to print."""
    return "".join(c if c.isalnum() else "?" for c in str(fingerprint)[:12])


def _state_of_one(frozen: Set[str], has: Iterable[str], lacks: Container[str]) -> set[str]:
    """Return the moments and averages that only one side has, of weights that are frozen on the other."""
    of_learning = (name for name in has if is_moment(name) or is_average(name))
    return {name for name in of_learning if name not in lacks and weight_of(name) in frozen}


def _difference(name: str, saved: StoredTensor | None, mine: TrainState) -> str | None:
    part = mine.slices.get(name)
    if saved is None:
        return f"{name} is not in it"
    if part is None:
        return f"it has {name}, which this model does not"
    if tuple(saved.shape) != part.global_shape:
        return f"{name} is {saved.shape} in it and {list(part.global_shape)} in this model"
    dtype = str(part.tensor.dtype).removeprefix("torch.")
    if saved.dtype != dtype:
        return f"{name} is {saved.dtype} in it and {dtype} in this model (train.dtype)"
    return None


def _refuse(path: Path, differences: list[str]) -> None:
    if differences:
        first, more = differences[0], f" (and {len(differences) - 1} more differences)" if differences[1:] else ""
        raise CheckpointError(
            f"{path}: was written by a different model: {first}{more}; use the run's own config, or a new name=..."
        )


def _changes(prefix: str, old: Any, new: Any) -> list[tuple[str, Any, Any]]:
    """Return (key, old, new) for each key of `old` whose value differs."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        return [change for key in old for change in _changes(f"{prefix}.{dotted((key,))}", old[key], new.get(key))]
    return [] if old == new else [(prefix, old, new)]
