"""Train trials in child processes, several at a time. Imports no torch."""

import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress

from trainer.errors import PREEMPTED, ResourceError, StopRequested
from trainer.supervise.die_with_parent import end_with
from trainer.supervise.stop_signals import StopSignals
from trainer.sweep.plan_trials import Trial, write_config
from trainer.sweep.trial_result import has_trained

_POLL_S = 0.05
_THREADS = "OMP_NUM_THREADS"


class TrialProcess:
    """A trial that trains in a process group of its own, so that Ctrl-C reaches it once, through the sweep.

    It is killed if the sweep is: another sweep can then go on from its checkpoint.
    """

    def __init__(self, trial: Trial, *, until: int, ranks: int, threads: int) -> None:
        """Start it, to train up to step `until`; what it prints goes to a file beside its run folder.

        Raises:
            ResourceError: if the folder cannot be written.
        """
        self.is_last = until >= trial.steps
        overrides = [] if self.is_last else [f"train.stop_after={until}"]
        self.trial, self.log = trial, trial.folder.path.with_name(f"{trial.name}.log")
        try:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            config = write_config(trial)
            with self.log.open("wb") as output:
                verb = ["train", str(config)] if ranks == 1 else ["launch", str(config), "--nproc", str(ranks)]
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "trainer", *verb, *overrides],
                    env={_THREADS: str(threads), **os.environ},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    process_group=0,
                    preexec_fn=end_with(os.getpid()),
                )
        except OSError as error:
            raise ResourceError(f"{self.log.parent}: cannot be written: {error.strerror}; set runs_dir") from None

    def poll(self) -> int | None:
        """Return the exit code, negative for a signal; None while it trains."""
        return self._process.poll()

    def request_stop(self) -> None:
        """Ask it to save and to stop."""
        self._process.terminate()

    def kill(self) -> None:
        """Kill it with all its processes."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def reason(self, code: int) -> str:
        """Return why it failed: its exit code and its last words."""
        words = self.log.read_text(errors="replace").strip().splitlines() or ["no output"]
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return f"{how}: {words[-1].strip()[:300]} ({self.log})"


def threads_of(slots: int, ranks: int, environment: Mapping[str, str] = os.environ) -> int:
    """Return the threads of each rank: an equal share of the cores, or what the environment says."""
    given = environment.get(_THREADS, "")
    return int(given) if given.isdecimal() and int(given) else max(1, len(os.sched_getaffinity(0)) // (slots * ranks))


def run_trials(
    trials: Sequence[Trial], *, until: int, slots: int, ranks: int, stop: StopSignals
) -> Iterator[tuple[Trial, str | None]]:
    """Train trials up to step `until`, `slots` at a time; yield each as it ends, with the reason if it failed.

    Raises:
        StopRequested: after a stop signal, once all have saved and stopped; a second signal kills them.
    """
    waiting, running = deque(trials), list[TrialProcess]()
    threads = threads_of(slots, ranks)
    try:
        while waiting or running:
            while waiting and len(running) < slots and not stop.count:
                trial = waiting.popleft()
                try:
                    running.append(TrialProcess(trial, until=until, ranks=ranks, threads=threads))
                except ResourceError as error:  # those that train go on
                    yield trial, str(error)
            if stop.count:
                _stop(running, stop)
                raise StopRequested(f"stopped by {stop.name}: trials have saved; repeat the command to continue")
            stop.sleep(_POLL_S)
            for process in [one for one in running if one.poll() is not None]:
                running.remove(process)
                code = process.poll()
                if code == PREEMPTED and stop.count:  # the signal reached the trial too
                    continue
                has_ended = code == (0 if process.is_last else PREEMPTED) and has_trained(process.trial, until)
                yield process.trial, None if has_ended else process.reason(code or 0)
    finally:
        for process in running:
            process.kill()


def _stop(running: list[TrialProcess], stop: StopSignals) -> None:
    """Let trials save and stop; kill them after a second signal."""
    before = stop.count
    for process in running:
        process.request_stop()
    while any(process.poll() is None for process in running) and stop.count == before:
        time.sleep(_POLL_S)
