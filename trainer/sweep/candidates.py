"""Candidates of a sweep: the keys and values that are tried. Imports no torch."""

import math
import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from trainer.config.base import repeated
from trainer.config.dump import inline
from trainer.errors import ConfigError
from trainer.sweep.sweep_config import HalvingConfig, RandomConfig, RangeConfig, SweepConfig

_UNFIT = re.compile(r"[^A-Za-z0-9.]+")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")
_MAX_NAME = 80
_MAX_CANDIDATES = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One choice of the keys that are tried."""

    name: str
    changes: Mapping[str, Any]
    """Value of each dotted key."""
    places: Mapping[str, tuple[str | int, ...]]
    """Where in the sweep file each value stands."""


def candidates(sweep: SweepConfig) -> list[Candidate]:
    """Return the candidates of a sweep, each with a name of its own.

    Raises:
        ConfigError: if two have one name or the same values, a name is no name of a folder, or they are too many.
    """
    method = sweep.method
    draws = method.draws if isinstance(method, RandomConfig | HalvingConfig) else None
    if draws is not None and isinstance(method, RandomConfig | HalvingConfig):
        found = list(_drawn(sweep.over, draws, method.draw_seed))
    else:
        found = list(_combinations(sweep.over))
    for index, point in enumerate(sweep.points):
        changes = {key: value for key, value in point.items() if key != "name"}
        name = point.get("name", _name_of(changes))
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            allowed = f"letters, digits, dots, dashes and underscores, at most {_MAX_NAME}"
            raise ConfigError(f"points.{index}.name: {inline(name)} is no name of a folder; use {allowed}")
        found.append(Candidate(name=name, changes=changes, places={key: ("points", index, key) for key in changes}))
    if twice := repeated(one.name for one in found):
        raise ConfigError(f"points: two candidates are called {twice[0]}; give one of them another name")
    if draws is None and (same := repeated(inline(dict(one.changes)) for one in found)):
        raise ConfigError(f"over: two candidates are both {same[0]}; list each once, and use `seeds` to repeat it")
    return found


def _combinations(over: Mapping[str, Any]) -> Iterator[Candidate]:
    """Yield every combination of listed values, the last key changing fastest."""
    if not over:
        return
    number = math.prod(len(values) for values in over.values())
    if number > _MAX_CANDIDATES:
        raise ConfigError(f"over: {number} combinations; use at most {_MAX_CANDIDATES}, or method: random")
    taken: Counter[str] = Counter()
    for indices in product(*(range(len(values)) for values in over.values())):
        changes = {key: over[key][index] for key, index in zip(over, indices, strict=True)}
        name = _name_of(changes)
        taken[name] += 1  # values that differ only in what no name of a folder can have
        places = {key: ("over", key, index) for key, index in zip(over, indices, strict=True)}
        yield Candidate(name=name if taken[name] == 1 else f"{name}-{taken[name]}", changes=changes, places=places)


def _drawn(over: Mapping[str, Any], draws: int, seed: int) -> Iterator[Candidate]:
    """Yield drawn values; more draws begin with the same candidates."""
    generator = random.Random(seed)
    for number in range(1, draws + 1):
        changes = {key: _draw(values, generator.random()) for key, values in over.items()}
        yield Candidate(name=f"draw{number:02d}", changes=changes, places={key: ("over", key) for key in over})


def _draw(values: Sequence[Any] | RangeConfig, share: float) -> Any:
    """Return the value at a share, from 0 to 1, of a range or a list."""
    if not isinstance(values, RangeConfig):
        return values[int(share * len(values))]
    if values.whole is not None:
        low, high = values.whole
        return low + int(share * (high - low + 1))
    if values.log_uniform is not None:
        low, high = values.log_uniform
        return float(f"{low * (high / low) ** share:.4g}")
    assert values.uniform is not None, "the config checked it"
    low, high = values.uniform
    return low + share * (high - low)


def _name_of(changes: Mapping[str, Any]) -> str:
    """Return a name of a folder that says which values these are."""
    lasts = Counter(key.rpartition(".")[2] for key in changes)
    parts = []
    for key, value in changes.items():
        words = key.split(".")
        shown = words[-1] if lasts[words[-1]] == 1 else "-".join(words[-2:])
        parts.append(f"{shown}-{_UNFIT.sub('-', inline(value)).strip('-') or 'x'}")
    return "_".join(parts)[:_MAX_NAME].rstrip("._-")
