"""Stop signals of a rank: the first one requests a stop, the second one ends the process. Imports no torch."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Self

from trainer.errors import StopRequested
from trainer.status import LIVENESS_FOLDER, STOP_SIGNAL

SAME_REQUEST_S = 2.0
"""Time in which a repeated signal is the same request, since a scheduler and torchrun both signal each process."""
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


def listen(handler: Callable[[int, FrameType | None], None]) -> dict[int, object]:
    """Install a handler for SIGTERM, SIGINT, SIGUSR1 (Slurm's warning) and SIGHUP; return the previous handlers.

    A signal that is ignored already (nohup, a shell's &) stays ignored.
    """
    handled = [number for number in _STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    return {number: signal.signal(number, handler) for number in handled}


def _signal_of_supervisor() -> str | None:
    """Return the signal that the supervisor received, if it requested this stop; it always forwards SIGTERM."""
    folder = os.environ.get(LIVENESS_FOLDER)
    if folder is None:
        return None
    try:
        name = (Path(folder) / STOP_SIGNAL).read_text()
    except OSError:  # the request does not come from the supervisor
        return None
    return name if name in {number.name for number in _STOP_SIGNALS} else None


class StopRequest:
    """Records the first stop signal.

    Before the first step there is nothing to save, so the signal ends the run at once. After that the handler only sets
    a flag, which the training loop checks between steps.

    A second signal has its default effect, so that an impatient user can always end the process; earlier checkpoints
    stay. Further signals are ignored within 2 seconds of the first, and after the run has obeyed: torchrun sends
    another one when the first rank has exited.
    """

    def __init__(self) -> None:
        self.requested_by: str | None = None
        self._ends_at_once, self._is_obeyed = True, False
        self._since = 0.0
        self._before: dict[int, object] = {}

    def __bool__(self) -> bool:
        """Return whether a stop was requested."""
        return self.requested_by is not None

    def __enter__(self) -> Self:
        self._before = listen(self._on_signal)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if not self._is_obeyed and kind is not StopRequested:
            self._restore()

    def begin_steps(self) -> None:
        """Only set the flag from now on; raises `StopRequested` if it is set already."""
        self._ends_at_once = False
        self.check()

    def check(self) -> None:
        """End a run if a stop was requested before its first step.

        Raises:
            StopRequested: if so. The handler raises it too, but it may run in code that swallows exceptions.
        """
        if self.requested_by is not None:
            raise StopRequested(
                f"stopped by {self.requested_by} before its first step: nothing is lost; start it again to continue"
            )

    def obey(self) -> None:
        """Ignore further signals: the run has saved and is ending."""
        self._is_obeyed = True

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._is_obeyed:
            return
        if self.requested_by is None:
            self.requested_by, self._since = _signal_of_supervisor() or signal.Signals(number).name, time.monotonic()
            if self._ends_at_once:
                self.check()
        elif time.monotonic() - self._since > SAME_REQUEST_S:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler)  # type: ignore[arg-type]
