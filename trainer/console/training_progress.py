"""Progress of a training run in plain values, with an estimate of the time left."""

from collections.abc import Mapping
from dataclasses import dataclass, field

Record = Mapping[str, float | None]
"""A line of metrics.jsonl; a value that is None or missing is unknown."""


@dataclass(slots=True, kw_only=True)
class TrainingProgress:
    """Current step, latest metrics and loss history of a run."""

    total_steps: int
    step: int = 0
    record: Record = field(default_factory=dict)  # the latest logged step
    eta_s: float | None = None
    bits_per_byte: float | None = None  # held-out value of the latest evaluation
    steps: list[int] = field(default_factory=list)
    losses: list[float | None] = field(default_factory=list)  # one for each of `steps`
    _first: tuple[int, float] | None = None
    """Step and time of the first record: compiling and starting processes do not count towards the pace."""

    def add(self, record: Record, *, now_s: float) -> None:
        """Take in a logged step, and estimate the time left from the wall clock, evaluations and saves included.

        At the first record `step_s` is the only measure of pace. An `eta_s` in the record takes precedence.
        """
        self.step, self.record = int(record["step"] or 0), record
        self.steps.append(self.step)
        self.losses.append(record.get("loss"))
        step_s = record.get("step_s")
        self._first = self._first or (self.step, now_s)
        first_step, first_s = self._first
        if self.step > first_step:
            step_s = (now_s - first_s) / (self.step - first_step)
        estimate_s = None if step_s is None else step_s * max(0, self.total_steps - self.step)
        self.eta_s = record.get("eta_s", estimate_s)

    @property
    def fraction(self) -> float:
        """Fraction of all steps that is done, 0 to 1."""
        return min(1.0, self.step / self.total_steps) if self.total_steps > 0 else 0.0

    @property
    def alerts(self) -> list[str]:
        """Non-zero counts that are 0 in a healthy run, in words."""
        names = (("dead_experts", "dead expert"), ("skipped_steps", "skipped step"), ("loss_spikes", "loss spike"))
        counts = [(self.record.get(key) or 0, name) for key, name in names]
        return [f"{count:.0f} {name}{'s' if count > 1 else ''}" for count, name in counts if count]
