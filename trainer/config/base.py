"""Base class of every section of an experiment file."""

import math
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, ClassVar, Final, NamedTuple, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

PATH_PATTERN = r"^[^\x00-\x1f\x7f]{0,1000}$"
LINE_PATTERN = r"^[^\x00-\x1f\x7f]*$"
"""Pattern of text without line breaks and other control characters."""


def expand_home(path: str) -> str:
    """Replace a leading ~ or ~USER of a path by the home folder, as a shell does."""
    try:
        return os.path.expanduser(path) if path.startswith("~") else path  # noqa: PTH111 - not a path yet
    except ValueError:  # no user has such a name
        return path


PathText = Annotated[str, Field(min_length=1, pattern=PATH_PATTERN), AfterValidator(expand_home)]
"""Path of at most 1000 characters without control characters; ~ is expanded."""
_MAX_DIVISORS: Final = 30
_NEAR_DIVISORS: Final = 10


class Problem(NamedTuple):
    """Broken rule between the keys of a section."""

    key: str
    """Dotted key below the section that the message is about; empty for the section itself."""
    message: str
    """Text of the problem: what is wrong, with the values; what is allowed; what to do."""


class Renamed(NamedTuple):
    """Present name of a key, and of its values, that has another name in older experiment files."""

    key: str
    values: Mapping[Any, Any] = {}
    """Old value -> present one; values that are not listed kept their names."""

    def value(self, old: Any) -> Any:
        """Return the present form of a value."""
        return self.values.get(old, old) if isinstance(old, str) else old


class Config(BaseModel):
    """One section of an experiment file: immutable, closed to unknown keys, strict about types.

    A subclass states the rules between its keys in `problems`. All of them are reported at once, by the loader with the
    line they are on and from Python as a pydantic `ValidationError`.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        validate_default=True,
        allow_inf_nan=False,
        defer_build=True,  # most sections of a file are left out, and every start of a rank reads one
    )

    old_names: ClassVar[Mapping[str, Renamed]] = {}
    """Former keys, which are still accepted: by the loader with a warning, from stored configs silently."""

    @model_validator(mode="before")
    @classmethod
    def _accept_old_names(cls, values: Any) -> Any:
        if not cls.old_names or not isinstance(values, dict):
            return values
        values = dict(values)
        for old, new in cls.old_names.items():
            if old in values and (old == new.key or new.key not in values):
                values[new.key] = new.value(values.pop(old))
        return values

    def problems(self) -> Iterator[Problem]:
        """Yield every rule between the keys of this section that its values break."""
        yield from ()

    def packages(self) -> Iterator[tuple[str, str]]:
        """Yield (key below this section, top-level package) for each optional package that its values need."""
        yield from ()

    @model_validator(mode="after")
    def _refuse_problems(self) -> Self:
        found = list(self.problems())
        if found:
            text = "; ".join(f"{p.key}: {p.message}" if p.key else p.message for p in found)
            raise PydanticCustomError("problems", "{text}", {"text": text, "found": found})
        return self


def repeated(values: Iterable[Any]) -> list[Any]:
    """Return the duplicates among values, each once, sorted."""
    return sorted(value for value, count in Counter(values).items() if count > 1)


def divisors(number: int, *, near: int) -> str:
    """Return the divisors of a number for a message; if there are many, those closest to `near`."""
    low = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    found = low + [number // d for d in reversed(low) if d * d != number]
    if len(found) <= _MAX_DIVISORS:
        return ", ".join(map(str, found))
    nearest = sorted(sorted(found, key=lambda d: abs(d - near))[:_NEAR_DIVISORS])
    return ", ".join([*map(str, nearest), "..."])
