"""Timer of the parts of a step, which never overlap and leave nothing out."""

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
    """Makes marks that are compared later: to know a device's time at once would mean to wait for the device."""

    def now(self) -> Any:
        """Return a mark."""
        ...

    def seconds(self, begin: Any, end: Any) -> float:
        """Return the time between two marks."""
        ...


class HostClock:
    """The processor's time, where the processor does the work."""

    def now(self) -> float:
        """Return seconds from some moment on."""
        return time.perf_counter()

    def seconds(self, begin: float, end: float) -> float:
        """Return the time between two marks."""
        return end - begin


class StepTimer:
    """Measures which part of its step a rank is in: exactly one at any moment.

    #  entered   data | forward                                      | backward                | optimizer
    #  within                  | dispatch | experts | combine |               | communication |
    #  counted   data | forward| dispatch | experts | combine |forward|backward|communication|..| optimizer

    A part within another one is not counted in that as well. Outside of steps nothing is measured.
    """

    def __init__(self, clock: Clock | None = None) -> None:
        self._clock = HostClock() if clock is None else clock
        self._open: list[tuple[StepPart, AbstractContextManager[object] | None]] = []
        """The part entered last, and what is within it, innermost last; empty outside of steps."""
        self._marks: list[tuple[StepPart, Any]] = []
        """What began in this step, and when; its last entry is the step's end."""
        self._before: list[tuple[StepPart, Any]] = []
        """The same of the step before."""
        self._seconds = dict.fromkeys(PARTS, 0.0)
        self.region: Callable[[str], AbstractContextManager[object]] | None = None
        """Names a part in the trace of a profiler, while one runs."""

    def start(self) -> None:
        """Begin a step; one that an error has ended is forgotten."""
        self._close_all()
        self._marks = []
        self._push("other")

    def enter(self, part: StepPart) -> None:
        """Begin a part where the one before ends."""
        if self._open:
            self._close_all()
            self._push(part)

    def begin(self, part: StepPart) -> None:
        """Begin a part within the present one."""
        if self._open:
            self._push(part)

    def end(self) -> None:
        """End what was begun last, and go on with what is around it."""
        if len(self._open) > 1:
            self._close()
            self._mark(self._open[-1][0])

    @contextmanager
    def within(self, part: StepPart) -> Iterator[None]:
        """Measure a block as a part within the present one."""
        self.begin(part)
        try:
            yield
        finally:
            self.end()

    def stop(self) -> None:
        """End the step."""
        self._close_all()
        self._mark("other")
        # A device is through with a step before the next one ends, since that one waits for its loss: no wait here.
        self._resolve()
        self._before, self._marks = self._marks, []

    def take(self) -> dict[StepPart, float]:
        """Return the seconds of each part, of the steps that ended since the last call; a device is waited for."""
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
