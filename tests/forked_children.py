"""Let a supervisor, torchrun or a sweep start ranks by forks of itself: in milliseconds, not by an import of torch.

For tests that are about what becomes of processes, and not about how one starts. All is as after an exec: parent,
group, signals, streams, descriptors, folder and variables; but /proc/PID/environ has those of the first ancestor.
"""

import atexit
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import Any

RunPython = Callable[[list[str]], None]
_FORKED = {"trainer", "trainer.distributed.torchrun", "torch.distributed.run"}
"""Modules that are run so: whoever starts them has computed nothing yet."""


def fork_children(run_python: RunPython) -> None:
    """Let `subprocess` start `python -m trainer ...` and torchrun by a fork, which calls `run_python`, from now on."""
    module: Any = subprocess
    module._fork_exec = partial(_start, module._fork_exec, run_python)


def _start(fork_exec: Callable[..., int], run_python: RunPython, *parts: Any) -> int:
    """Do what `_fork_exec` of subprocess does, whose arguments have places and no names."""
    words = [os.fsdecode(word) for word in parts[0] if word != "-u"]
    if words[:2] != [sys.executable, "-m"] or words[2] not in _FORKED:
        return fork_exec(*parts)
    start = _Start(
        kept={*parts[3]} - {parts[13]},  # the other end of that pipe waits until python runs
        folder=parts[4],
        variables=parts[5],
        streams=(parts[6], parts[9], parts[11]),
        is_session=parts[15],
        group=parts[16],
        prepare=parts[21],
    )
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        start.become(partial(run_python, words[1:]))
    return pid


@dataclass(frozen=True, slots=True, kw_only=True)
class _Start:
    """How a process is to start."""

    kept: set[int]
    """Descriptors that it inherits."""
    folder: str | None
    variables: Sequence[bytes] | None
    streams: tuple[int, int, int]
    """Descriptors of standard input, output and error; -1: those of the parent."""
    is_session: bool
    group: int
    prepare: Callable[[], None] | None

    def become(self, run: Callable[[], None]) -> None:
        """Become what an exec would have made of this fork; never returns."""
        code = 1
        try:
            self._set_up_process()
            _forget_parent()
            run()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            module: Any = threading
            module._shutdown()
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def _set_up_process(self) -> None:
        for number, descriptor in enumerate(self.streams):
            if descriptor != -1:
                os.dup2(descriptor, number)
        if self.folder is not None:
            os.chdir(self.folder)
        if self.is_session:
            os.setsid()
        if self.group >= 0:
            os.setpgid(0, self.group)
        if self.prepare is not None:
            self.prepare()
        for descriptor in {int(path.name) for path in Path("/proc/self/fd").iterdir()} - {0, 1, 2} - self.kept:
            if descriptor not in _of_the_server():
                with suppress(OSError):  # that of the listing
                    os.close(descriptor)
        if self.variables is not None:
            os.environ.clear()
            for variable in self.variables:
                name, _, value = os.fsdecode(variable).partition("=")
                os.environ[name] = value


def _forget_parent() -> None:
    """Drop what an exec drops: handlers of signals and of the exit, streams, and what modules have been set to."""
    atexit._clear()
    signal.set_wakeup_fd(-1)
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    logging.disable(logging.NOTSET)
    tempfile.tempdir = None
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)


def _of_the_server() -> set[int]:
    """Return the descriptors by which this process asks multiprocessing's server for more processes."""
    server: Any = forkserver
    tracker: Any = resource_tracker
    return {server._forkserver._forkserver_alive_fd, tracker._resource_tracker._fd}
