"""Rows that cannot be used: what is wrong with one, and how many were left out. Imports no torch."""

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import Field

from trainer.config.base import Config
from trainer.errors import DataError

OnBadRow = Literal["error", "skip"]
_NUM_PLACES = 10
_MAX_PLACE = 300
_Entry = TypeVar("_Entry")


class BadRow(DataError):
    """One row cannot be used, though the others of its file can; or a file that would be one row, or has none."""

    def __init__(self, message: str, *, reason: str = "cannot be used", file: str | Path | None = None) -> None:
        """Say what is wrong.

        Args:
            message: one line that begins with the place.
            reason: what is counted together, in a few words.
            file: path of the file, if nothing of it can be used.
        """
        super().__init__(message)
        self.reason = reason
        self.file = None if file is None else str(file)


class SkippedRows(Config):
    """Rows that were left out."""

    reasons: dict[str, int] = Field(default={})
    """Number of rows for each reason."""
    first: list[str] = Field(default=[])
    """The first few: place and reason."""
    empty_files: list[str] = Field(default=[])
    """Files of which nothing could be used."""

    @property
    def count(self) -> int:
        """Number of bad rows."""
        return sum(self.reasons.values())

    def __str__(self) -> str:
        ordered = sorted(self.reasons.items(), key=lambda item: (-item[1], item[0]))
        return ", ".join(f"{number} {reason}" for reason, number in ordered)


class SkippedCounter:
    """Counts rows that are left out, one after the other."""

    def __init__(self) -> None:
        self._reasons: Counter[str] = Counter()
        self._first: list[str] = []
        self._files: list[str] = []

    def add(self, row: BadRow) -> None:
        """Count a row."""
        self._reasons[row.reason] += 1
        if len(self._first) < _NUM_PLACES:
            self._first.append(str(row)[:_MAX_PLACE])
        if row.file is not None:
            self._files.append(row.file)

    def total(self) -> SkippedRows:
        """Return what was counted so far."""
        return SkippedRows(reasons=dict(self._reasons), first=list(self._first), empty_files=list(self._files))


def all_skipped(parts: Iterable[SkippedRows]) -> SkippedRows:
    """Return what was left out of parts together, in their order."""
    reasons: Counter[str] = Counter()
    first: list[str] = []
    files: list[str] = []
    for part in parts:
        reasons.update(part.reasons)
        first += part.first
        files += part.empty_files
    return SkippedRows(reasons=dict(reasons), first=first[:_NUM_PLACES], empty_files=files)


def usable(entries: Iterable[_Entry | BadRow]) -> Iterator[_Entry]:
    """Yield the entries.

    Raises:
        BadRow: the first one that there is.
    """
    for entry in entries:
        if isinstance(entry, BadRow):
            raise entry
        yield entry
