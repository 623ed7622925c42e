"""Starts a run, and starts it again when something that may not happen again has ended it."""

import contextlib
import os
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import closing

from trainer.checkpoint.checkpoint_folder import CheckpointFolder
from trainer.checkpoint.run_folder import RunFolder
from trainer.distributed.process import is_alive
from trainer.errors import PREEMPTED
from trainer.status import ATTEMPT, Status, read_statuses
from trainer.supervise.child import Child
from trainer.supervise.exit_status import ExitStatus, diagnose_exit
from trainer.supervise.launch import Launch, environment_of_attempt
from trainer.supervise.liveness_monitor import LivenessMonitor
from trainer.supervise.policy import AttemptOutcome, Policy, Restart, decide, is_retried
from trainer.supervise.stop_signals import StopSignals
from trainer.terminal import print_safe

_LOOK_S = 0.1
_LOOK_AT_RANKS_S = 1.0
_LAST_CHANCE_S = 5.0
"""A run that was asked to stop a second time has so long to end."""
_DONE_S = 330.0
"""When its ranks are done, torchrun waits five minutes for other machines, or for ever if its store is silent."""
_START_S = 300.0
"""While it imports torch, or compiles, a process may be silent for so much longer."""
_LOCK_S, _OLD_STORE_S = 30.0, 15.0
"""An attempt waits so long for what the last one has left: the folder's lock, the first machine's port."""


class Supervisor:
    """Watches over one run on one machine."""

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
        """Prepare.

        Args:
            launch: which ranks to start.
            arguments: of `python -m trainer`, for every rank.
            folder: of the run.
            patience_s: when one of several ranks has failed, the others may take so long to end.
            silence_s: the only rank of a run may be frozen for so long; of several the others notice it, so they have
                `patience_s`.
            policy: how patient to be with a run that fails.
        """
        self._launch, self._arguments, self._folder = launch, arguments, folder
        self._patience_s, self._policy = patience_s, policy or Policy()
        self._silence_s = silence_s if launch.world_size == 1 else patience_s

    def run(self) -> int:
        """Run to the end, to a failure that is final, or until asked to stop; return the exit code."""
        before, history, endings = newest_checkpoint(self._folder), [], []
        with StopSignals() as requests:
            while True:
                ending = self._attempt(requests)
                history.append(AttemptOutcome(code=ending.code, checkpoint=newest_checkpoint(self._folder)))
                endings.append(ending)
                if requests.count:
                    return self._stopped(requests, ending)
                restart = None if ending.is_unsaved else decide(history, before=before, policy=self._policy)
                if restart is None:
                    if is_retried(ending.code) and not ending.is_unsaved:
                        _say(_given_up(endings[-self._policy.max_restarts - 1 :], history[-1].checkpoint))
                    return ending.exit_code
                _say(_announcement(ending, history[-1].checkpoint, restart))
                requests.sleep(restart.pause_s)
                self._wait_for_leftovers(requests)
                if requests.count:
                    return self._stopped_between(requests, ending, history[-1].checkpoint)

    def _attempt(self, requests: StopSignals) -> ExitStatus:
        """Start the ranks once and wait for their end."""
        is_alone = self._launch.world_size == 1
        with closing(LivenessMonitor("0" if is_alone else "torchrun")) as life:
            return self._watch(requests, life, environment_of_attempt(os.environ) | life.environment, is_alone=is_alone)

    def _watch(
        self, requests: StopSignals, life: LivenessMonitor, environment: dict[str, str], *, is_alone: bool
    ) -> ExitStatus:
        """Start a process, stop it when asked to, kill it when it is lost; return how it ended."""
        child = Child(self._launch.command(self._arguments), environment)
        num_asked, looked, kill_at = 0, time.monotonic(), float("inf")
        silent: list[str] = []
        while (returncode := child.poll()) is None:
            time.sleep(_LOOK_S)
            now = time.monotonic()
            if requests.count > num_asked:
                num_asked += 1
                life.ask(requests.name)
                child.ask_to_stop()
                if num_asked > 1:
                    kill_at = min(kill_at, now + _LAST_CHANCE_S)
            life.listen()
            if now - looked > _LOOK_AT_RANKS_S:
                looked, statuses = now, self._statuses(environment)
                if not is_alone and any(map(_has_failed, statuses.values())):
                    kill_at = min(kill_at, now + self._patience_s)
                if not is_alone and all(_is_done(statuses.get(rank)) for rank in self._launch.ranks):
                    kill_at = min(kill_at, now + _DONE_S)
                silent = silent or self._silent(life, statuses)
            if silent or now > kill_at:
                child.kill()
        report = child.close()
        statuses = self._statuses(environment)
        return diagnose_exit(
            returncode,
            pid=child.pid,
            report=report,
            statuses=statuses,
            ranks=self._launch.ranks,
            is_alone=is_alone,
            silent=silent,
            silence_s=self._silence_s,
        )

    def _silent(self, life: LivenessMonitor, statuses: Mapping[int, Status]) -> list[str]:
        """Return who is frozen: silent for too long, and not because it has ended."""
        has_begun = any(status.phase != "start-up" for status in statuses.values())
        limit_s = self._silence_s if has_begun else self._silence_s + _START_S
        return [name for name in life.silent(limit_s) if _may_run(name, statuses)]

    def _statuses(self, environment: dict[str, str]) -> dict[int, Status]:
        return read_statuses(self._folder.status, environment[ATTEMPT])

    def _wait_for_leftovers(self, requests: StopSignals) -> None:
        """Wait until what the last attempt held is free: a new one would take it for another run's, or talk to it."""
        if self._launch.node_rank == 0:
            end = time.monotonic() + _LOCK_S
            while self._folder.owner() is not None and time.monotonic() < end and not requests.count:
                time.sleep(_LOOK_S)
            return
        # The first machine's ranks may still be ending: who joins their store meets the dead.
        address, end = (self._launch.master_addr, self._launch.master_port), time.monotonic() + _OLD_STORE_S
        with contextlib.suppress(OSError):  # refused: the old one has gone
            while time.monotonic() < end and not requests.count:
                socket.create_connection(address, timeout=1.0).close()
                time.sleep(_LOOK_S)

    def _stopped(self, requests: StopSignals, ending: ExitStatus) -> int:
        """Return the exit code of a run that was asked to stop and has ended."""
        if not is_retried(ending.code):
            return ending.exit_code
        if not ending.has_begun:  # it was asked before it could listen
            _say(f"stopped by {requests.name} before its first step: nothing is lost; start again to go on")
            return PREEMPTED
        newest = newest_checkpoint(self._folder)
        _say(f"{ending.what} {ending.where}, after {requests.name} had asked it to stop; {_newest_is(newest)}")
        return ending.exit_code

    def _stopped_between(self, requests: StopSignals, ending: ExitStatus, newest: int | None) -> int:
        """Return the exit code of a run that was asked to stop while it waited to start again."""
        _say(f"stopped by {requests.name} before it was started again; {_newest_is(newest)}")
        return PREEMPTED if newest is not None or ending.step <= 1 else ending.exit_code


def newest_checkpoint(folder: RunFolder) -> int | None:
    """Return the step of a run's newest checkpoint by name; None if there is none."""
    steps: list[int] = []
    with contextlib.suppress(OSError):
        steps = CheckpointFolder(folder.checkpoints).steps()
    return max(steps, default=None)


def _has_failed(status: Status) -> bool:
    """Tell whether a rank has ended before the end of the run, with or without a word."""
    return status.exit_code != 0 if status.state == "ended" else not is_alive(status.pid)


def _is_done(status: Status | None) -> bool:
    return status is not None and status.state == "ended" and status.exit_code == 0


def _may_run(name: str, statuses: Mapping[int, Status]) -> bool:
    """Tell whether a process that is silent has not just ended."""
    status = statuses.get(int(name)) if name.isdigit() else None
    return status is None or (status.state != "ended" and is_alive(status.pid))


def _announcement(ending: ExitStatus, newest: int | None, restart: Restart) -> str:
    return (
        f"{ending.what} {ending.where}; starting again from step {newest or 0} in {restart.pause_s:g} s "
        f"(restart {restart.number}, {restart.num_left} more without progress)"
    )


def _given_up(endings: Sequence[ExitStatus], newest: int | None) -> str:
    """Say how the last attempt ended, and in which step each of them did."""
    last, places = endings[-1], [_place(ending) for ending in endings]
    is_one_place = len(set(places)) == 1
    where = f"every attempt ended {places[0]}" if is_one_place else f"the attempts ended {', '.join(places)}"
    return (
        f"{last.what} {last.where}; giving up with exit code {last.exit_code}: "
        f"{len(endings) - 1} restarts made no progress\n{where}; {_newest_is(newest)}"
    )


def _place(ending: ExitStatus) -> str:
    if ending.rows is None:
        return "in start-up"
    return f"in step {ending.step} with rows {ending.rows[0]} to {ending.rows[1]}"


def _newest_is(newest: int | None) -> str:
    return "there is no checkpoint yet" if newest is None else f"the newest checkpoint is of step {newest}"


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # the terminal has gone
        print_safe(text, file=sys.stderr)
