"""Steps at which a run waits for a test: so that no test depends on being faster than the run that it disturbs.

A rank waits at the beginning of a step, where no collective is under way that could time out; its heartbeat goes on.
A rank that was asked to stop waits no longer: it takes the step and saves. Obeyed by forks (tests/imported_once.py),
and by python as a user starts it if `customize` has been called.
"""

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.distributed.signals import StopRequest
from trainer.status import StatusFile

_VARIABLE = "TESTS_HELD_STEPS"


@dataclass(frozen=True, slots=True)
class HeldSteps:
    """Steps of a run that no rank takes, and none after them, before the test releases them."""

    folder: Path
    """A folder for this run alone; need not exist."""
    steps: Sequence[int]
    run: str = ""
    """The run that is meant; empty: every one."""

    def environment(self) -> dict[str, str]:
        """Return the variable by which processes know of them."""
        return {_VARIABLE: f"{self.folder.absolute()}:{self.run}:{','.join(map(str, self.steps))}"}

    def customize(self) -> str:
        """Write what makes python obey, and return the folder to put into PYTHONPATH."""
        self.folder.mkdir(exist_ok=True)
        (self.folder / "sitecustomize.py").write_text("from tests import held_steps\n\nheld_steps.obey()\n")
        return str(self.folder.absolute())

    def release(self, *steps: int) -> None:
        """Let the ranks take some of the steps, or all of them, now and after every restart."""
        self.folder.mkdir(exist_ok=True)
        for step in steps or self.steps:
            _released(self.folder, step).touch()


def obey() -> None:
    """Wait at the steps that this process is told to, if any."""
    whole = StatusFile.begin_step
    if _VARIABLE not in os.environ or getattr(whole, "is_held", False):
        return

    def begin_step(file: StatusFile, step: int, **rows: Any) -> None:
        whole(file, step, **rows)
        folder, run, steps = os.environ[_VARIABLE].rsplit(":", 2)
        is_meant = run in ("", file.path.parents[1].name)
        awaited = [_released(Path(folder), held) for held in map(int, steps.split(",")) if is_meant and held <= step]
        if not all(path.exists() for path in awaited):
            file.enter("reading")  # a test can see this step (others are written once a second), and no rank is stuck
        while not all(path.exists() for path in awaited) and not _is_asked_to_stop():
            time.sleep(0.01)
        file.status.phase = "training"

    setattr(begin_step, "is_held", True)  # noqa: B010 - a function has no such attribute
    setattr(StatusFile, "begin_step", begin_step)  # noqa: B010 - a method for everybody else


def _is_asked_to_stop() -> bool:
    request = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    return isinstance(request, StopRequest) and bool(request)


def _released(folder: Path, step: int) -> Path:
    return folder / f"released.{step}"
