"""Stop signals of a supervisor."""

import signal
import time
from types import FrameType
from typing import Self

from trainer.distributed.signals import SAME_REQUEST_S, listen


class StopSignals:
    """Counts stop signals; a signal within SAME_REQUEST_S of the last counted one is the same request."""

    def __init__(self) -> None:
        self.count = 0
        self.name = ""
        self._last = 0.0
        self._before: dict[int, object] = {}

    def __enter__(self) -> Self:
        self._before = listen(self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def sleep(self, seconds: float) -> None:
        """Sleep, but return at the first stop signal."""
        end = time.monotonic() + seconds
        while self.count == 0 and time.monotonic() < end:
            time.sleep(min(0.1, seconds))

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.count and now - self._last <= SAME_REQUEST_S:
            return
        self.count += 1
        self.name = self.name or signal.Signals(number).name
        self._last = now
