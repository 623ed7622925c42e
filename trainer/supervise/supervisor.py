"""Supervisor: start a run, and restart it after failures that may not recur."""

import contextlib
import os
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace

from trainer.checkpoint.checkpoint_folder import CheckpointFolder
from trainer.checkpoint.run_folder import RunFolder
from trainer.distributed.process import is_alive
from trainer.errors import PREEMPTED, CommError, exit_code_of
from trainer.status import ATTEMPT, Status, read_statuses
from trainer.supervise.child import Child
from trainer.supervise.exit_status import ExitStatus, diagnose_exit
from trainer.supervise.launch import Launch, environment_of_attempt
from trainer.supervise.liveness_monitor import LivenessMonitor
from trainer.supervise.policy import AttemptOutcome, Policy, decide, is_retried
from trainer.supervise.seats import RunIsOver, Seats
from trainer.supervise.stop_signals import StopSignals
from trainer.terminal import print_error

_POLL_S = 0.1
_STATUS_POLL_S = 1.0
_SECOND_STOP_S = 5.0  # time for a run to end after the second stop signal
_TORCHRUN_EXIT_S = 330.0
"""Time for torchrun to exit after its ranks: it waits 5 minutes for other nodes, for ever if its store is silent."""
_START_S = 300.0  # additional silence allowed during start-up, while a process imports torch or compiles
_LOCK_S, _OLD_STORE_S = 30.0, 15.0
"""Longest wait before a restart: until the run folder is unlocked, and until the first node's port is closed."""


class Supervisor:
    """Supervises one run, `python -m trainer` with the same arguments for every rank, on one node.

    `patience_s` is the time for the other ranks to end after one has failed, `silence_s` the longest silence of a
    single rank. With several ranks the others detect a frozen one, so that limit is `patience_s` too.
    """

    def __init__(
        self,
        launch: Launch,
        arguments: Sequence[str],
        folder: RunFolder,
        *,
        patience_s: float,
        silence_s: float = 60.0,
        policy: Policy | None = None,
    ) -> None:
        self._launch, self._arguments, self._folder = launch, arguments, folder
        self._seats = Seats(folder.machines, launch, lost_s=silence_s) if launch.spares else None
        self._patience_s, self._policy = patience_s, policy or Policy()
        self._silence_s = silence_s if launch.world_size == 1 else patience_s

    def run(self) -> int:
        """Run to the end, to a final failure or to a stop signal; return the exit code."""
        if self._seats is None:
            return self._run()
        self._seats.open()
        try:
            code = self._run()
        except BaseException as error:
            self._seats.leave(exit_code_of(error) or 1)
            raise
        self._seats.leave(code)
        return code

    def _run(self) -> int:
        first_checkpoint, history, endings = newest_checkpoint(self._folder), [], list[ExitStatus]()
        with StopSignals() as requests:
            while True:
                if (over := self._take_seat(requests, endings)) is not None:
                    return over
                ending = self._attempt(requests)
                history.append(AttemptOutcome(code=ending.code, checkpoint=newest_checkpoint(self._folder)))
                endings.append(ending)
                if requests.count:
                    return self._stopped(requests, ending)
                restart = None if ending.is_unsaved else decide(history, before=first_checkpoint, policy=self._policy)
                if restart is None:
                    if is_retried(ending.code) and not ending.is_unsaved:
                        print_error(_given_up(endings[-self._policy.max_restarts - 1 :], history[-1].checkpoint))
                    return ending.exit_code
                print_error(
                    f"{ending.what} {ending.where}; starting again from step {history[-1].checkpoint or 0} in "
                    f"{restart.pause_s:g} s (restart {restart.number}, {restart.num_left} more without progress)"
                )
                requests.sleep(restart.pause_s)

    def _take_seat(self, requests: StopSignals, endings: Sequence[ExitStatus]) -> int | None:
        """Wait until the ranks of this machine may start, with spares on whichever node; or return the exit code."""
        seat: Launch | None = self._launch
        if self._seats is not None:
            try:
                seat = self._seats.take(requests)
            except RunIsOver as over:
                print_error(over)
                return over.code or (endings[-1].exit_code if endings else 0)
        if seat is not None:
            self._launch = seat
        if endings or self._seats is not None:
            self._wait_for_leftovers(requests)
        if not requests.count or (not endings and self._seats is None):
            return None
        newest = newest_checkpoint(self._folder)
        if not endings:
            print_error(f"stopped by {requests.name} before this machine had a node; {_newest_is(newest)}")
            return PREEMPTED
        print_error(f"stopped by {requests.name} before it was started again; {_newest_is(newest)}")
        return PREEMPTED if newest is not None or endings[-1].step <= 1 else endings[-1].exit_code

    def _attempt(self, requests: StopSignals) -> ExitStatus:
        """Start the ranks once, forward stop signals, kill them if they hang; return their exit status."""
        is_alone = self._launch.world_size == 1
        num_forwarded, read_at, kill_at = 0, time.monotonic(), float("inf")
        silent: list[str] = []
        lost: str | None = None
        with closing(LivenessMonitor("0" if is_alone else "torchrun")) as life:
            environment = environment_of_attempt(os.environ) | life.environment
            child = Child(self._launch.command(self._arguments), environment)
            while (returncode := child.poll()) is None:
                time.sleep(_POLL_S)
                now = time.monotonic()
                if requests.count > num_forwarded:
                    num_forwarded += 1
                    life.record_stop_signal(requests.name)
                    child.request_stop()
                    if num_forwarded > 1:
                        kill_at = min(kill_at, now + _SECOND_STOP_S)
                life.poll()
                if now - read_at > _STATUS_POLL_S:
                    read_at, statuses = now, self._statuses(environment)
                    if not is_alone and any(map(_has_failed, statuses.values())):
                        kill_at = min(kill_at, now + self._patience_s)
                    if not is_alone and all(
                        rank in statuses and statuses[rank].exit_code == 0 for rank in self._launch.ranks
                    ):
                        kill_at = min(kill_at, now + _TORCHRUN_EXIT_S)
                    has_begun = any(status.phase != "start-up" for status in statuses.values())
                    limit_s = self._silence_s if has_begun else self._silence_s + _START_S
                    silent = silent or [name for name in life.silent(limit_s) if _may_run(name, statuses)]
                    if self._seats is not None and not has_begun:
                        lost = lost or self._seats.lost_since()
                if silent or lost is not None or now > kill_at:
                    child.kill()
            report = child.close()
        statuses, ranks = self._statuses(environment), self._launch.ranks
        frozen = {"silent": silent, "silence_s": self._silence_s}
        ending = diagnose_exit(
            returncode, pid=child.pid, report=report, statuses=statuses, ranks=ranks, is_alone=is_alone, **frozen
        )
        if lost is None or ending.code != -signal.SIGKILL:
            return ending
        return replace(ending, what=lost, code=CommError.exit_code, exit_code=CommError.exit_code)

    def _statuses(self, environment: dict[str, str]) -> dict[int, Status]:
        return read_statuses(self._folder.status, environment[ATTEMPT])

    def _wait_for_leftovers(self, requests: StopSignals) -> None:
        """Wait until the last attempt has released the folder's lock or, on other nodes, the rendezvous port."""
        if self._launch.node_rank == 0:
            end = time.monotonic() + _LOCK_S
            while self._folder.owner() is not None and time.monotonic() < end and not requests.count:
                time.sleep(_POLL_S)
            return
        if self._seats is not None:  # nobody is given a node before every machine's attempt has ended
            return
        # While the first node's old store still listens, new ranks would connect to the old attempt.
        address, end = (self._launch.master_addr, self._launch.master_port), time.monotonic() + _OLD_STORE_S
        with contextlib.suppress(OSError):  # connection refused: the old store is gone
            while time.monotonic() < end and not requests.count:
                socket.create_connection(address, timeout=1.0).close()
                time.sleep(_POLL_S)

    def _stopped(self, requests: StopSignals, ending: ExitStatus) -> int:
        """Return the exit code of a run that has ended after a stop signal."""
        if not is_retried(ending.code):
            return ending.exit_code
        if not ending.has_begun:  # the signal came before the handler was installed
            print_error(
                f"stopped by {requests.name} before its first step: nothing is lost; start it again to continue"
            )
            return PREEMPTED
        newest = newest_checkpoint(self._folder)
        print_error(
            f"{ending.what} {ending.where}, after a stop was requested by {requests.name}; {_newest_is(newest)}"
        )
        return ending.exit_code


def newest_checkpoint(folder: RunFolder) -> int | None:
    """Return the step of a run's newest checkpoint, intact or not; None if there is none."""
    steps: list[int] = []
    with contextlib.suppress(OSError):
        steps = CheckpointFolder(folder.checkpoints).steps()
    return max(steps, default=None)


def _has_failed(status: Status) -> bool:
    """Return whether a rank has failed: with an exit code, or without having written one."""
    return status.exit_code != 0 if status.state == "ended" else not is_alive(status.pid)


def _may_run(name: str, statuses: Mapping[int, Status]) -> bool:
    status = statuses.get(int(name)) if name.isdigit() else None
    return status is None or (status.state != "ended" and is_alive(status.pid))


def _given_up(endings: Sequence[ExitStatus], newest: int | None) -> str:
    """Return a message: how the last attempt ended, and in which step each attempt did."""
    last, steps = endings[-1], [_step(ending) for ending in endings]
    is_same_step = len(set(steps)) == 1
    where = f"every attempt ended {steps[0]}" if is_same_step else f"the attempts ended {', '.join(steps)}"
    return (
        f"{last.what} {last.where}; giving up with exit code {last.exit_code}: "
        f"{len(endings) - 1} restarts made no progress\n{where}; {_newest_is(newest)}"
    )


def _step(ending: ExitStatus) -> str:
    if ending.rows is None:
        return "in start-up"
    return f"in step {ending.step} with rows {ending.rows[0]} to {ending.rows[1]}"


def _newest_is(newest: int | None) -> str:
    return "there is no checkpoint yet" if newest is None else f"the newest checkpoint is of step {newest}"
