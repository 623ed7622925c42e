"""Throughput of steps, and a breakdown of their time."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from trainer.step_timer import StepPart, StepTimer


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Throughput of some steps."""

    tokens_per_s: float
    step_s: float
    parts: dict[StepPart, float]
    """Seconds of a step; together `step_s`."""


class StepPace:
    """Tokens and seconds since the last logged step; what is done between two steps is not training time."""

    def __init__(self, step_timer: StepTimer, clock: Callable[[], float] = time.perf_counter) -> None:
        self._step_timer, self._clock = step_timer, clock
        self._tokens = self._steps = 0
        self._seconds = self._began = 0.0

    def begin(self) -> None:
        """Begin a step."""
        self._began = self._clock()
        self._step_timer.start()

    def end(self, num_tokens: int) -> None:
        """End it."""
        self._step_timer.stop()
        self._seconds += self._clock() - self._began
        self._tokens += num_tokens
        self._steps += 1

    def take(self) -> Speed:
        """Return the speed since the last call; there must have been a step."""
        seconds, parts = self._seconds, self._step_timer.take()
        # A GPU's clock may run past the end of the last step, whose update the processor does not wait for.
        parts["other"] = max(0.0, seconds - sum(parts.values()) + parts["other"])
        speed = Speed(
            tokens_per_s=self._tokens / seconds,
            step_s=seconds / self._steps,
            parts={part: s / self._steps for part, s in parts.items()},
        )
        self._tokens = self._steps = 0
        self._seconds = 0.0
        return speed
