"""Progress of a run in plain values, with an estimate of the time left."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

Record = Mapping[str, float | None]
"""A line of metrics.jsonl: its keys are the contract between the loop and every sink."""


@dataclass(slots=True, kw_only=True)
class TrainingProgress:
    """Progress of a training and its last metrics."""

    total_steps: int
    step: int = 0
    record: Record = field(default_factory=dict)
    """The last logged step; empty before the first."""
    eta_s: float | None = None
    bits_per_byte: float | None = None
    """Held out, of the last evaluation."""
    steps: list[int] = field(default_factory=list)
    losses: list[float | None] = field(default_factory=list)
    """One for each of `steps`."""

    @property
    def fraction(self) -> float:
        """Part of all steps that is done, 0 to 1."""
        return min(1.0, self.step / self.total_steps) if self.total_steps > 0 else 0.0

    @property
    def troubles(self) -> list[str]:
        """Counts that are 0 in a healthy run, in words; none where they are 0 or unknown."""
        counted = (("dead_experts", "dead expert"), ("skipped_steps", "skipped step"), ("loss_spikes", "loss spike"))
        found = [(self.record.get(key) or 0, name) for key, name in counted]
        return [f"{count:.0f} {name}{'s' if count > 1 else ''}" for count, name in found if count]


@dataclass(slots=True, kw_only=True)
class BarProgress:
    """A job that is measured in bytes."""

    label: str
    total_bytes: int
    done_bytes: int = 0
    elapsed_s: float = 0.0

    @property
    def fraction(self) -> float:
        """Part of all bytes that is done, 0 to 1."""
        return min(1.0, self.done_bytes / self.total_bytes) if self.total_bytes > 0 else 0.0

    @property
    def bytes_per_s(self) -> float | None:
        """Mean speed so far; None before any time has passed."""
        return self.done_bytes / self.elapsed_s if self.elapsed_s > 0 else None


class Pace:
    """Estimates the time left from the clock on the wall, evaluations and checkpoints included.

    The clock starts at the first record, so that compiling and starting processes do not count.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._start: tuple[int, float] | None = None

    def eta_s(self, step: int, total_steps: int, step_s: float | None) -> float | None:
        """Return the seconds to `total_steps`; `step_s` is the only measure at the first record."""
        now = self._clock()
        if self._start is None:
            self._start = (step, now)
        first, started = self._start
        if step > first:
            step_s = (now - started) / (step - first)
        return None if step_s is None else step_s * max(0, total_steps - step)
