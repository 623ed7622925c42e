"""Findings of all checks, as lines for a screen and as JSON values. Imports no torch."""

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.doctor.finding import Check, DoctorFinding, examine

_WIDTH = 118
_INDENT = "  "


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """Findings of checks, the severe ones first."""

    findings: Sequence[DoctorFinding] = ()
    checks: Sequence[str] = ()
    """Names of all checks that looked."""
    notes: Sequence[str] = ()
    """Parts that were not looked at, and why."""

    @classmethod
    def of(cls, checks: Sequence[Check[Any]], subject: Any, *, notes: Iterable[str] = ()) -> "Diagnosis":
        """Return what checks find in a subject."""
        return cls(
            findings=examine(checks, subject),
            checks=[check.name for check in checks],
            notes=list(notes),
        )

    def __add__(self, other: "Diagnosis") -> "Diagnosis":
        return Diagnosis(
            findings=[*self.findings, *other.findings],
            checks=[*self.checks, *other.checks],
            notes=[*self.notes, *other.notes],
        )

    @property
    def in_order(self) -> list[DoctorFinding]:
        """The findings, severe ones first."""
        return sorted(self.findings, key=lambda finding: finding.severity != "severe")

    @property
    def num_severe(self) -> int:
        """Number of severe findings."""
        return sum(finding.severity == "severe" for finding in self.findings)

    @property
    def exit_code(self) -> int:
        """1 if anything is severe."""
        return 1 if self.num_severe else 0

    def record(self) -> dict[str, Any]:
        """Return JSON values."""
        found = [finding.record() for finding in self.in_order]
        return {"findings": found, "checks": list(self.checks), "notes": list(self.notes)}

    def lines(self) -> Iterator[str]:
        """Yield the lines of the screen."""
        for finding in self.in_order:
            yield f"{finding.severity}: {finding.check}"
            yield from _paragraph(finding.found)
            yield from _paragraph(f"why: {finding.why} ({finding.source})")
            yield from _paragraph(f"do:  {finding.remedy}")
        for note in self.notes:
            yield from textwrap.wrap(f"note: {note}", _WIDTH)
        yield f"{len(self.checks)} checks: {self._verdict()}"

    def _verdict(self) -> str:
        warnings = len(self.findings) - self.num_severe
        if not self.findings:
            return "nothing found"
        return f"{self.num_severe} severe, {warnings} {'warning' if warnings == 1 else 'warnings'}"


def _paragraph(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=_INDENT, subsequent_indent=_INDENT * 2)
