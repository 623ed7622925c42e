"""Start Python processes in milliseconds: forks of a server that has imported everything and computed nothing.

For tests that are not about the start of a process, which would spend most of its time importing torch. What such a
process starts by `python -m trainer` or torchrun, as `launch` and `sweep` do, is a fork too (tests/forked_children.py).
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import trainer.training.generate_text
import trainer.training.main
from tests import held_steps, shared_fork_server
from tests.forked_children import fork_children
from trainer import fault_injection
from trainer.prove import pool  # uses the same server, so its imports are among these

OF_A_RUN = (
    *("trainer.cli", "trainer.training.main", "trainer.engine.native", "trainer.optim.create", "numpy.ma"),
    *("trainer.parallel.replicate", "trainer.data.sources.text", "trainer.moe.routers.bias_balanced"),
)
"""Modules that every run imports, some of them late."""
CONTEXT = multiprocessing.get_context("forkserver")
"""Multiprocessing context whose processes are such forks."""
CONTEXT.set_forkserver_preload(
    [
        *pool.PRELOAD,
        *OF_A_RUN,
        *("trainer.checkpoint.tools.export_dcp", "tests.imported_once", "pytest"),
        *("torch.distributed.launcher.api", "trainer.distributed.liveness_pipe"),  # of torchrun
        *("scipy.optimize", "scipy.sparse"),  # half of the time of a run that measures routing_gap
        *("torch._inductor.compile_fx", "torch._dynamo.repro.after_dynamo"),  # 2 s of a rank of DeepSpeed, or compiled
        "tests.freeze_imports",  # last: forks need not look for garbage in all of these
    ]
)


class Process:
    """A running `python ARGUMENTS`, like subprocess.Popen."""

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        cwd: Path,
        stdout: Path | None = None,
        stderr: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Start the process.

        Args:
            arguments: `-m MODULE ...` or `SCRIPT ...`.
            cwd: working directory.
            stdout: file for its output; None: discard.
            stderr: the same.
            environment: variables added to those of this process.
        """
        variables = {**os.environ, **(environment or {})}
        outputs = [os.devnull if path is None else str(path.absolute()) for path in (stdout, stderr)]
        todo = (list(arguments), str(cwd), outputs, variables, shared_fork_server.start())
        self._process = CONTEXT.Process(target=_work, args=todo, daemon=True)
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    def poll(self) -> int | None:
        """Return the exit code, negative for a signal, or None while running."""
        return self._process.exitcode

    def wait(self, timeout: float) -> int:
        """Return the exit code.

        Raises:
            subprocess.TimeoutExpired: if it is still running.
        """
        self._process.join(timeout)
        code = self.poll()
        if code is None:
            raise subprocess.TimeoutExpired("warm python", timeout)
        return code

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal if the process is running."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill the process."""
        self.send_signal(signal.SIGKILL)


def run(
    arguments: Sequence[str],
    *,
    cwd: Path,
    environment: Mapping[str, str] | None = None,
    timeout: float = 100.0,
) -> subprocess.CompletedProcess[str]:
    """Run `python ARGUMENTS` to its end, like subprocess.run with captured output."""
    with tempfile.TemporaryDirectory() as folder:
        stdout, stderr = Path(folder) / "stdout", Path(folder) / "stderr"
        process = Process(arguments, cwd=cwd, stdout=stdout, stderr=stderr, environment=environment)
        try:
            code = process.wait(timeout)
        finally:
            process.kill()
        return subprocess.CompletedProcess(arguments, code, stdout.read_text(), stderr.read_text())


def shorten_sample() -> None:
    """Let a run of this process say 4 bytes at its end, not 320: they take longer than twenty steps of training."""
    setattr(trainer.training.generate_text, "_SAMPLE_TOKENS", 4)  # noqa: B010 - a constant for everybody else


def _work(
    arguments: list[str], cwd: str, outputs: list[str], variables: dict[str, str], server: dict[str, Any]
) -> None:
    for number, path in zip((1, 2), outputs, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(variables)
    multiprocessing.current_process().daemon = False  # it may start ranks, by the same server, not by one of its own
    shared_fork_server.adopt(server)
    fork_children(_run)
    _run(arguments)


def _run(arguments: list[str]) -> None:
    """Run `python ARGUMENTS` in this process."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    shorten_sample()
    held_steps.obey()
    fault_injection._PLANNED[:] = fault_injection.parse_faults(
        os.environ.get("TURNOUT_FAULTS", ""), os.environ.get("RANK", "0")
    )
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")
