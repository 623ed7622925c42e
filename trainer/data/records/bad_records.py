"""Unusable records: their error, and counts of those that were skipped. Imports no torch."""

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import Field

from trainer.config.base import Config
from trainer.errors import DataError

OnBadRecord = Literal["error", "skip"]
_MAX_EXAMPLES = 10
_MAX_EXAMPLE_CHARACTERS = 300
_Entry = TypeVar("_Entry")


class BadRecord(DataError):
    """A record that cannot be used although others of its file can; also a file that is one record or has none."""

    def __init__(self, message: str, *, reason: str = "cannot be used", file: str | Path | None = None) -> None:
        """Skipped records are counted by `reason`; `file` is given if none of it can be used."""
        super().__init__(message)
        self.reason = reason
        self.file = None if file is None else str(file)


class SkippedRecords(Config):
    """Counts and examples of skipped records."""

    reasons: dict[str, int] = Field(default={})
    """Number of records by reason."""
    first: list[str] = Field(default=[])
    """Place and reason of the first few."""
    empty_files: list[str] = Field(default=[])
    """Files of which nothing could be used."""

    @property
    def count(self) -> int:
        """Number of skipped records."""
        return sum(self.reasons.values())

    def __str__(self) -> str:
        ordered = sorted(self.reasons.items(), key=lambda item: (-item[1], item[0]))
        return ", ".join(f"{number} {reason}" for reason, number in ordered)


class SkippedCounter:
    """Accumulates skipped records."""

    def __init__(self) -> None:
        self._reasons: Counter[str] = Counter()
        self._first: list[str] = []
        self._files: list[str] = []

    def add(self, record: BadRecord) -> None:
        """Count a record."""
        self._reasons[record.reason] += 1
        if len(self._first) < _MAX_EXAMPLES:
            self._first.append(str(record)[:_MAX_EXAMPLE_CHARACTERS])
        if record.file is not None:
            self._files.append(record.file)

    def total(self) -> SkippedRecords:
        """Return the counts so far."""
        return SkippedRecords(reasons=dict(self._reasons), first=list(self._first), empty_files=list(self._files))


def merge_skipped(parts: Iterable[SkippedRecords]) -> SkippedRecords:
    """Add up the counts of several parts; examples keep the order of the parts."""
    reasons: Counter[str] = Counter()
    first: list[str] = []
    files: list[str] = []
    for part in parts:
        reasons.update(part.reasons)
        first += part.first
        files += part.empty_files
    return SkippedRecords(reasons=dict(reasons), first=first[:_MAX_EXAMPLES], empty_files=files)


def raise_on_bad(entries: Iterable[_Entry | BadRecord]) -> Iterator[_Entry]:
    """Yield the entries up to the first bad one, and raise that."""
    for entry in entries:
        if isinstance(entry, BadRecord):
            raise entry
        yield entry
