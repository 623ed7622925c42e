"""Being asked to stop: the first signal asks, the second one ends the process. Imports no torch."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

from trainer.errors import StopRequested
from trainer.status import LIVENESS_FOLDER, STOP_SIGNAL

SAME_REQUEST_S = 2.0
"""Time in which a repeated signal is the same request: a scheduler and torchrun both send it to every process."""
_ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


def listen(handler: Callable[[int, FrameType | None], None]) -> dict[int, object]:
    """Handle what asks a process to stop: SIGTERM, Ctrl-C, SIGUSR1 (Slurm's warning), SIGHUP (the terminal has gone).

    A signal that was ignored before (nohup, a shell's &) stays ignored.

    Returns:
        Who handled each of them before.
    """
    heard = [number for number in _ASKING if signal.getsignal(number) is not signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in heard}


def _asked_by() -> str | None:
    """Return the signal that a supervisor was sent, if it is why this process is asked; it sends SIGTERM always."""
    folder = os.environ.get(LIVENESS_FOLDER)
    if folder is None:
        return None
    try:
        name = (Path(folder) / STOP_SIGNAL).read_text()
    except OSError:  # somebody else asks
        return None
    return name if name in {number.name for number in _ASKING} else None


class StopRequest:
    """Notes the first signal that asks to stop.

    Before the first step there is nothing to save, and the run ends where it is. From then on the handler only sets a
    flag: the loop looks at it between two steps.

    Another signal is handled as if nobody listened, so an impatient user always gets out; what was saved before stays.
    Not so within 2 seconds of the first. Nor once the request was obeyed: the process is ending, and torchrun sends
    one more as soon as the first rank has ended.
    """

    def __init__(self) -> None:
        self.requested_by: str | None = None
        """Name of the signal, once there was one."""
        self._ends_at_once, self._is_obeyed = True, False
        self._since = 0.0
        self._before: dict[int, object] = {}

    def __bool__(self) -> bool:
        """Tell whether a stop was asked for."""
        return self.requested_by is not None

    def __enter__(self) -> Self:
        self._before = listen(self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._is_obeyed and kind is not StopRequested:
            self._restore()

    def begin_steps(self) -> None:
        """Only note signals from now on.

        Raises:
            Stopped: if there was one already.
        """
        self._ends_at_once = False
        self.check()

    def check(self) -> None:
        """End a run that was asked to stop before its first step.

        Raises:
            Stopped: if it was; the handler does so itself, unless it ran in code that swallows every error.
        """
        if self.requested_by is not None:
            raise StopRequested(
                f"stopped by {self.requested_by} before its first step: nothing is lost; start again to go on"
            )

    def obey(self) -> None:
        """Do nothing about further signals: the run has saved, and ends."""
        self._is_obeyed = True

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._is_obeyed:
            return
        if self.requested_by is None:
            self.requested_by, self._since = _asked_by() or signal.Signals(number).name, time.monotonic()
            if self._ends_at_once:
                self.check()
        elif time.monotonic() - self._since > SAME_REQUEST_S:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler)  # type: ignore[arg-type]
