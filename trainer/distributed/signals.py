"""Being asked to stop: the first signal asks, the second one ends the process."""

import signal
import time
from types import FrameType, TracebackType
from typing import Self

_SAME_REQUEST_S = 2.0


class StopRequest:
    """Listens for Ctrl-C and SIGTERM. The handler only sets a flag: the loop looks at it between two steps.

    Another signal is handled as if nobody listened, so an impatient user always gets out; what was saved before stays.
    Not so within 2 seconds of the first: a scheduler and torchrun both send it to every process.
    """

    def __init__(self) -> None:
        self.requested_by: str | None = None
        """Name of the signal, once there was one."""
        self._since = 0.0
        self._before: dict[int, object] = {}

    def __bool__(self) -> bool:
        """Tell whether a stop was asked for."""
        return self.requested_by is not None

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._restore()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested_by is None:
            self.requested_by, self._since = signal.Signals(number).name, time.monotonic()
        elif time.monotonic() - self._since > _SAME_REQUEST_S:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler)  # type: ignore[arg-type]
