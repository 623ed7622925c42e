"""Timer of the parts of a step, which do not overlap and add up to the whole step."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import pairwise
from typing import Any, Literal, Protocol, get_args

StepPart = Literal[
    "data", "forward", "dispatch", "experts", "combine", "backward", "optimizer", "communication", "other"
]
PARTS: tuple[StepPart, ...] = get_args(StepPart)


class Clock(Protocol):
    """Clock whose timestamps are compared later, since reading a device's time at once would synchronise with it."""

    def now(self) -> Any:
        """Return a timestamp."""
        ...

    def seconds(self, begin: Any, end: Any) -> float:
        """Return the time between two marks."""
        ...


class HostClock:
    """Clock of the CPU."""

    def now(self) -> float:
        """Return a monotonic time in seconds."""
        return time.perf_counter()

    def seconds(self, begin: float, end: float) -> float:
        """Return the time between two marks."""
        return end - begin


class StepTimer:
    """Measures the time in each part of a step; exactly one part is active at a time.

    #  entered   data | forward                                      | backward                | optimizer
    #  nested                  | dispatch | experts | combine |               | communication |
    #  counted   data | forward| dispatch | experts | combine |forward|backward|communication|..| optimizer

    The time of a nested part does not count for the enclosing one. Nothing is measured outside of steps.
    """

    def __init__(self, clock: Clock | None = None) -> None:
        self._clock = HostClock() if clock is None else clock
        self._open: list[tuple[StepPart, AbstractContextManager[object] | None]] = []
        """Current part and its nested parts, innermost last; empty outside of steps."""
        self._marks: list[tuple[StepPart, Any]] = []
        """Parts begun in this step, with timestamps; the last entry is the end of the step."""
        self._before: list[tuple[StepPart, Any]] = []
        """The same for the previous step."""
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self.region: Callable[[str], AbstractContextManager[object]] | None = None
        """Opens a named region in a profiler's trace, while one is recorded."""

    def start(self) -> None:
        """Begin a step; discard one that ended by an error."""
        self._close_all()
        self._marks = []
        self._push("other")

    def enter(self, part: StepPart) -> None:
        """End the current part and begin another."""
        if self._open:
            self._close_all()
            self._push(part)

    def begin(self, part: StepPart) -> None:
        """Begin a part nested in the current one."""
        if self._open:
            self._push(part)

    def end(self) -> None:
        """End the innermost nested part and return to the enclosing one."""
        if len(self._open) > 1:
            self._close()
            self._mark(self._open[-1][0])

    @contextmanager
    def within(self, part: StepPart) -> Iterator[None]:
        """Measure a block as a part nested in the current one."""
        self.begin(part)
        try:
            yield
        finally:
            self.end()

    def stop(self) -> None:
        """End the step."""
        self._close_all()
        self._mark("other")
        # No wait: the device has finished the previous step, since this one synchronised with its loss.
        self._resolve()
        self._before, self._marks = self._marks, []

    def take(self) -> dict[StepPart, float]:
        """Return the seconds of each part in the steps since the last call; synchronises with the device."""
        self._resolve()
        seconds, self._seconds = self._seconds, dict.fromkeys(PARTS, 0.0)
        return seconds

    def _push(self, part: StepPart) -> None:
        self._mark(part)
        region = None if self.region is None else self.region(part)
        if region is not None:
            region.__enter__()
        self._open.append((part, region))

    def _close(self) -> None:
        _, region = self._open.pop()
        if region is not None:
            region.__exit__(None, None, None)

    def _close_all(self) -> None:
        while self._open:
            self._close()

    def _mark(self, part: StepPart) -> None:
        self._marks.append((part, self._clock.now()))

    def _resolve(self) -> None:
        for (part, begin), (_, end) in pairwise(self._before):
            self._seconds[part] += self._clock.seconds(begin, end)
        self._before = []
