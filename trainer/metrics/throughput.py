"""Measure throughput and the time of each part of a step."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from trainer.step_timer import StepPart, StepTimer


@dataclass(frozen=True, slots=True, kw_only=True)
class Throughput:
    """Mean throughput over several steps."""

    tokens_per_s: float
    step_s: float
    parts: dict[StepPart, float]
    """Seconds of each part of a step; they add up to `step_s`."""


class ThroughputMeter:
    """Counts tokens and seconds since the last logged step; time between steps is not training time."""

    def __init__(self, step_timer: StepTimer, clock: Callable[[], float] = time.perf_counter) -> None:
        self._step_timer, self._clock = step_timer, clock
        self._tokens = self._steps = 0
        self._seconds = self._began = 0.0

    def begin(self) -> None:
        """Start a step."""
        self._began = self._clock()
        self._step_timer.start()

    def end(self, num_tokens: int) -> None:
        """End the step."""
        self._step_timer.stop()
        self._seconds += self._clock() - self._began
        self._tokens += num_tokens
        self._steps += 1

    def take(self) -> Throughput:
        """Return the throughput since the last call; at least one step must have ended."""
        seconds, parts = self._seconds, self._step_timer.take()
        # GPU time may run past the end of the last step, since the host does not wait for its update.
        parts["other"] = max(0.0, seconds - sum(parts.values()) + parts["other"])
        throughput = Throughput(
            tokens_per_s=self._tokens / seconds,
            step_s=seconds / self._steps,
            parts={part: s / self._steps for part, s in parts.items()},
        )
        self._tokens = self._steps = 0
        self._seconds = 0.0
        return throughput
