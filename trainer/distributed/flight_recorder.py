"""Flight recorder of a rank: its phase and the last collectives it took part in. Imports no torch."""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from trainer import fault_injection
from trainer.step_timer import StepPart, StepTimer

_REMEMBERED = 32
_PART_OF: dict[str, StepPart] = {
    "data": "data",
    "counting": "forward",
    "forward": "forward",
    "backward": "backward",
    "gradient sums": "optimizer",  # but for the waiting: norms
    "update": "optimizer",
    "router update": "optimizer",
}


@dataclass(frozen=True, slots=True)
class Operation:
    """One collective, as this rank saw it."""

    number: int
    """Counts this rank's collectives from 1; equal on all ranks as long as they do the same."""
    name: str
    group: str
    sizes: tuple[int, ...]
    """Elements, or rows sent to each rank."""

    def __str__(self) -> str:
        return f"#{self.number} {self.name} over {self.group} {list(self.sizes)}"


@dataclass(slots=True)
class FlightRecorder:
    """The last collectives of this rank, oldest first, and where it is."""

    step: int = 0
    """The step being taken, from 1; 0 before the first."""
    phase: str = "start-up"
    """Part of the step, or what is done between two steps."""
    count: int = 0
    running: Operation | None = None
    """The exchange that this rank is in now."""
    changed_at: float = field(default_factory=time.monotonic)
    """When something was last written down."""
    is_in_step: bool = False
    """Inside a step that is not the first one: nothing takes long here but waiting for others."""
    operations: deque[Operation] = field(default_factory=lambda: deque(maxlen=_REMEMBERED))
    step_timer: StepTimer = field(default_factory=StepTimer)
    """Measures the same phases, and how long exchanges are waited for."""

    def enter(self, phase: str) -> None:
        """Write down that another phase begins."""
        self.phase, self.changed_at = phase, time.monotonic()
        self.step_timer.enter(_PART_OF.get(phase, "other"))
        fault_injection.hit(f"phase.{phase.replace(' ', '_')}")

    def note(self, name: str, group: str, sizes: Sequence[int]) -> Operation:
        """Write an operation down, as it begins."""
        self.count += 1
        operation = Operation(self.count, name, group, tuple(sizes))
        self.operations.append(operation)
        self.changed_at = time.monotonic()
        fault_injection.hit("collective.begin")
        return operation

    def wait_for(self, operation: Operation) -> None:
        """Write down that this rank cannot go on before the operation has come back."""
        self.running, self.changed_at = operation, time.monotonic()
        self.step_timer.begin("communication")

    def end(self) -> None:
        """Write down that the operation has come back."""
        self.running, self.changed_at = None, time.monotonic()
        self.step_timer.end()
        fault_injection.hit("collective.end")

    @property
    def quiet_s(self) -> float:
        """Seconds since something was written down."""
        return time.monotonic() - self.changed_at
