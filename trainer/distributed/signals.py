"""Being asked to stop: the first signal asks, the second one ends the process."""

import signal
from types import FrameType, TracebackType
from typing import Self


class StopRequest:
    """Listens for Ctrl-C and SIGTERM. The handler only sets a flag: the loop looks at it between two steps.

    The second signal is handled as if nobody listened, so an impatient user always gets out;
    what was saved before stays.
    """

    def __init__(self) -> None:
        self.requested_by: str | None = None
        """Name of the signal, once there was one."""
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
        self.requested_by = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler)  # type: ignore[arg-type]
