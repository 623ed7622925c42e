"""Start ranks in milliseconds: this process imports everything once, and forks every rank of every attempt.

The ranks run the real command line with torchrun's environment. As torchrun does, the forker ends all ranks when one
dies, unless a scenario tests that they end by themselves.
"""

import importlib
import os
import re
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from multiprocessing import Pipe
from pathlib import Path

import torch

import trainer.cli
import trainer.training.main
from tests.imported_once import OF_A_RUN
from trainer import fault_injection
from trainer.distributed.interface import LOOPBACK
from trainer.distributed.store import serve
from trainer.supervise.die_with_parent import end_with

for _module in OF_A_RUN:
    importlib.import_module(_module)

_GRACE_S = 20.0
"""A rank that was asked to end has so long."""

Prepare = Callable[[], None]
"""Runs in a rank before anything else: what is observed, and what a negative control breaks."""


@dataclass(slots=True)
class Attempt:
    """The ranks of one start of a run."""

    pids: list[int]
    outputs: list[Path]
    """What each rank has printed, both streams."""
    began: float = field(default_factory=time.monotonic)
    codes: dict[int, int] = field(default_factory=dict)
    """Exit code of each rank that has ended; a signal is negative."""

    def poll(self) -> dict[int, int]:
        """Return the exit codes so far."""
        for rank, pid in enumerate(self.pids):
            if rank not in self.codes:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self.codes[rank] = os.waitstatus_to_exitcode(status)
        return self.codes

    def kill(self, ranks: Sequence[int], how: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to those of the ranks that have not ended."""
        for rank in ranks:
            if rank not in self.poll():
                os.kill(self.pids[rank], how)

    def listens(self) -> bool:
        """Return whether every rank handles SIGTERM already; before that the signal just kills it."""
        caught = [
            re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
            for rank, pid in enumerate(self.pids)
            if rank not in self.codes
        ]
        return all(mask is not None and int(mask[1], 16) >> (signal.SIGTERM - 1) & 1 for mask in caught)

    def wait(self, *, seconds: float, until: Callable[[], bool] | None = None) -> bool:
        """Wait until all ranks have ended or `until` is true; return False on timeout."""
        end = time.monotonic() + seconds
        while len(self.poll()) < len(self.pids):
            if until is not None and until():
                return True
            if time.monotonic() > end:
                return False
            time.sleep(0.005)
        return until is None or until()

    def settle(self, *, seconds: float, lets_survivors_end: bool = False) -> list[int | None]:
        """Wait for the end of an attempt; when one rank fails, end the others as torchrun does.

        Args:
            seconds: the longest that the whole may take.
            lets_survivors_end: do not end them: they are to notice by themselves.

        Returns:
            The exit code of every rank; None for one that had to be killed because it was late.
        """

        def has_failed() -> bool:
            return not lets_survivors_end and any(code != 0 for code in self.codes.values())

        in_time = self.wait(seconds=seconds, until=has_failed)
        if len(self.poll()) < len(self.pids) and in_time:
            self.kill(range(len(self.pids)), signal.SIGKILL)
            self.wait(seconds=_GRACE_S)
        late = [rank for rank in range(len(self.pids)) if rank not in self.poll()]
        self.kill(late)
        self.wait(seconds=_GRACE_S)
        return [None if rank in late else self.codes[rank] for rank in range(len(self.pids))]

    def said(self) -> str:
        """Return what all ranks have printed."""
        return "".join(path.read_text(errors="replace") for path in self.outputs if path.exists())


class RankForker:
    """Forks ranks. Create it before this process computes anything with torch, since forks inherit no threads."""

    def __init__(self) -> None:
        self._numbers = count(1)
        here, there = Pipe()
        self._store_pid = os.fork()
        if self._store_pid == 0:  # the store that all attempts meet in, as torchrun's agent hosts it
            end_with(os.getppid())()
            store = serve(LOOPBACK, 0, clients=None, timeout_s=60)
            there.send(store.port)
            while True:
                signal.pause()
        self._port = here.recv()

    def close(self) -> None:
        """End the store."""
        os.kill(self._store_pid, signal.SIGKILL)
        os.waitpid(self._store_pid, 0)

    def start(
        self,
        folder: Path,
        arguments: Sequence[str],
        *,
        world_size: int = 1,
        planted: str = "",
        prepare: Prepare | None = None,
        environment: Mapping[str, str] | None = None,
        largest_file: int | None = None,
    ) -> Attempt:
        """Start `python -m trainer ARGUMENTS` as every rank of a run.

        Args:
            folder: to run in; gets out.RANK.
            arguments: of the command line.
            world_size: ranks.
            planted: faults, as TURNOUT_FAULTS has them.
            prepare: called in each rank first.
            environment: more variables.
            largest_file: bytes that a file may have; more is refused as a full disk does it.
        """
        number, pids, outputs = next(self._numbers), [], []
        for rank in range(world_size):
            outputs.append(folder / f"out.{rank}")
            outputs[-1].unlink(missing_ok=True)
            pid = os.fork()
            if pid == 0:
                variables = {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(world_size),
                    "LOCAL_WORLD_SIZE": str(world_size),
                    "MASTER_ADDR": LOOPBACK,
                    "MASTER_PORT": str(self._port),
                    "TORCHELASTIC_USE_AGENT_STORE": "True",
                    "TORCHELASTIC_RESTART_COUNT": str(number),
                    **(environment or {}),
                }
                _be_a_rank(folder, outputs[-1], arguments, variables, planted, prepare, largest_file)
            pids.append(pid)
        return Attempt(pids, outputs)


def _be_a_rank(
    folder: Path,
    output: Path,
    arguments: Sequence[str],
    variables: Mapping[str, str],
    planted: str,
    prepare: Prepare | None,
    largest_file: int | None,
) -> None:
    """Run as a rank; never returns."""
    code = 99
    try:
        end_with(os.getppid())()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's & ignores it, and so would the rank
        os.environ.update(variables)
        os.chdir(folder)
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        torch.set_num_threads(1)
        fault_injection._PLANNED[:] = fault_injection.parse_faults(planted, variables["RANK"])
        if largest_file is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
        if prepare is not None:
            prepare()
        trainer.cli.main(arguments)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        # Python cuts such a thread off on its way out, in the middle of torch's code: now and then that aborts.
        if code in (0, 75) and any(thread.name == "saver" for thread in threading.enumerate()):
            print("Traceback: the run has ended, and a thread still saves")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
