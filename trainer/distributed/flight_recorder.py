"""Flight recorder of a rank: its current phase and last collectives. Imports no torch."""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from trainer import fault_injection
from trainer.step_timer import StepPart, StepTimer

_MAX_OPERATIONS = 32
_PART_OF: dict[str, StepPart] = {
    "data": "data",
    "counting": "forward",
    "forward": "forward",
    "backward": "backward",
    "gradient sums": "optimizer",  # norms; waiting for collectives counts as communication
    "update": "optimizer",
    "router update": "optimizer",
}


@dataclass(frozen=True, slots=True)
class Operation:
    """One collective on this rank."""

    number: int
    """Sequence number of the collective on this rank, from 1; equal on all ranks while they run in step."""
    name: str
    group: str
    sizes: tuple[int, ...]
    """Number of elements, or of rows sent to each rank."""

    def __str__(self) -> str:
        return f"#{self.number} {self.name} over {self.group} {list(self.sizes)}"


@dataclass(slots=True)
class FlightRecorder:
    """Phase of this rank and its last collectives, oldest first."""

    step: int = 0
    """Current step, from 1; 0 before the first."""
    phase: str = "start-up"
    """Part of the run: of start-up, of a step or between steps."""
    count: int = 0
    running: Operation | None = None
    changed_at: float = field(default_factory=time.monotonic)
    is_in_step: bool = False
    """Inside a step other than the first, where only waiting for other ranks takes long."""
    operations: deque[Operation] = field(default_factory=lambda: deque(maxlen=_MAX_OPERATIONS))
    step_timer: StepTimer = field(default_factory=StepTimer)

    def enter(self, phase: str) -> None:
        """Begin a phase. Tests inject faults at the beginning of a phase, by its name."""
        self.phase, self.changed_at = phase, time.monotonic()
        self.step_timer.enter(_PART_OF.get(phase, "other"))
        fault_injection.hit(f"phase.{phase.replace(' ', '_')}")

    def note(self, name: str, group: str, sizes: Sequence[int]) -> Operation:
        """Record that a collective begins."""
        self.count += 1
        operation = Operation(self.count, name, group, tuple(sizes))
        self.operations.append(operation)
        self.changed_at = time.monotonic()
        fault_injection.hit("collective.begin")
        return operation

    def wait_for(self, operation: Operation) -> None:
        """Record that this rank waits for a collective."""
        self.running, self.changed_at = operation, time.monotonic()
        self.step_timer.begin("communication")

    def end(self) -> None:
        """Record that the collective has completed."""
        self.running, self.changed_at = None, time.monotonic()
        self.step_timer.end()
        fault_injection.hit("collective.end")

    @property
    def quiet_s(self) -> float:
        """Seconds since the last change."""
        return time.monotonic() - self.changed_at
