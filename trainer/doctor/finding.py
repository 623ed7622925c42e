"""Findings, and checks as values: their subject, why it matters and where that was learned. Imports no torch."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Generic, Literal, TypeVar

Severity = Literal["severe", "warning"]
"""`severe`: what is learned, or whether anything is, will be wrong, or the run will end; `warning`: it may be."""
_Subject = TypeVar("_Subject")


@dataclass(frozen=True, slots=True)
class Sign:
    """A condition that a check has met."""

    found: str
    """Keys and values that were found."""
    remedy: str
    """Keys to set, or other steps to take."""
    severity: Severity | None = None
    """None: that of the check."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DoctorFinding:
    """A sign with the check that it belongs to."""

    check: str
    severity: Severity
    found: str
    why: str
    source: str
    remedy: str

    def record(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)  # no slots: Python 3.11 cannot create a generic class that has them
class Check(Generic[_Subject]):
    """A known failure, and how to see it."""

    name: str
    severity: Severity
    find: Callable[[_Subject], Iterable[Sign]]
    """Yields its signs in a subject: a config on a host, a measured step or a run."""
    why: str
    """Consequence of the failure."""
    source: str
    """Where it happened: repository#issue, or a paper."""

    def findings(self, subject: _Subject) -> Iterator[DoctorFinding]:
        """Yield what the check finds in a subject."""
        for sign in self.find(subject):
            yield DoctorFinding(
                check=self.name,
                severity=sign.severity or self.severity,
                found=sign.found,
                why=self.why,
                source=self.source,
                remedy=sign.remedy,
            )


def examine(checks: Iterable[Check[_Subject]], subject: _Subject) -> list[DoctorFinding]:
    """Return what the checks find in a subject."""
    return [finding for check in checks for finding in check.findings(subject)]
