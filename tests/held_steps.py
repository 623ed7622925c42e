"""Steps at which a run waits for a test: so that no test depends on being faster than the run that it disturbs.

A rank waits at the beginning of a step, where no collective is under way that could time out; its heartbeat goes on.
Obeyed by forks (tests/imported_once.py), and by python as a user starts it if `customize` has been called.
"""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.status import StatusFile

_VARIABLE = "TESTS_HELD_STEPS"


@dataclass(frozen=True, slots=True)
class HeldSteps:
    """Steps of a run that no rank takes, and none after them, before the test releases them."""

    folder: Path
    """A folder for this run alone; need not exist."""
    steps: Sequence[int]

    def environment(self) -> dict[str, str]:
        """Return the variable by which processes know of them."""
        return {_VARIABLE: f"{self.folder.absolute()}:{','.join(map(str, self.steps))}"}

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
        folder, _, steps = os.environ[_VARIABLE].rpartition(":")
        awaited = [_released(Path(folder), held) for held in map(int, steps.split(",")) if held <= step]
        if not all(path.exists() for path in awaited):
            file.enter("training")  # so that a test can see this step: others are written once a second
        while not all(path.exists() for path in awaited):
            time.sleep(0.01)

    setattr(begin_step, "is_held", True)  # noqa: B010 - a function has no such attribute
    setattr(StatusFile, "begin_step", begin_step)  # noqa: B010 - a method for everybody else


def _released(folder: Path, step: int) -> Path:
    return folder / f"released.{step}"
