"""Watchdog: name the lost rank when a collective fails or hangs, and end this one.

The heartbeats of all ranks are published once a second in torchrun's store, node by node. A rank that waits for others
in a barrier reads those of the few that it watches. When a collective has failed or timed out, one rank reads all of
them twice, and names the ranks that have gone silent, for everyone (`verdict.py`); then all exit.

The store may also fall silent, if its host freezes or is cut off. Requests to it then block for ever, whatever timeout
torch was given. So the watchdog's thread sends no requests while all is well, and sets a deadline before each request
after a failure.
"""

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Literal

import torch.distributed as dist

from trainer.distributed.deadline import exit_after, exit_now
from trainer.distributed.flight_recorder import FlightRecorder
from trainer.distributed.heartbeat import MAX_OPERATIONS_SHOWN, Heartbeat, diagnose_lost_store
from trainer.distributed.heartbeat_thread import HeartbeatThread, NodeRanks, key_of, read_heartbeats
from trainer.distributed.process import is_alive, pid_namespace
from trainer.distributed.verdict import Verdict, find_cause, is_known, reach_verdict, watched_ranks
from trainer.errors import CommError, RemoteRankError, StopRequested, TurnoutError, first_line

_LIVENESS_CHECK_S, _MAX_POLL_S = 2.0, 0.5
"""While waiting in a barrier: interval of liveness checks, and longest interval of polls."""
_STORE_DEADLINE_S = 4.0  # deadline for the store's answer after this rank gave up
_KEY_TIMEOUT_S = 5.0  # timeout for a key that should be in the store
_REPORT_S = 10.0  # time for rank 0 to report what normally all ranks have found
_REPORTED = "reported"
_CHECK_S = 0.25
_GRACE_S = 1.0  # time after its timeout at which the watchdog ends a collective that did not fail by itself
_EXIT_S = 2.0  # time for a rank that gave up to exit regularly
_PACKAGE = str(Path(__file__).parents[1])
_THIS_FOLDER = str(Path(__file__).parent)


class Watchdog:
    """Watchdog of one rank; no collective takes longer than `timeout_s`.

    The store is shared by all ranks of this attempt. With `on_gpu` collectives return at once and are waited for
    elsewhere, so a flight recorder without changes in the middle of a step counts as waiting. `store_address` is for
    messages; `store_node_ranks` are the ranks on the store's host, if this is not one of them. `ranks_per_node` are
    consecutive ones; None: all are on one node.
    """

    def __init__(
        self,
        store: dist.Store,
        *,
        rank: int,
        world_size: int,
        recorder: FlightRecorder,
        timeout_s: float,
        on_gpu: bool = False,
        store_address: str = "",
        store_node_ranks: Sequence[int] = (),
        ranks_per_node: int | None = None,
    ) -> None:
        self.rank, self.world_size, self.recorder = rank, world_size, recorder
        self._ranks_per_node = ranks_per_node or world_size
        self._watched = watched_ranks(rank, world_size=world_size, ranks_per_node=self._ranks_per_node)
        self.timeout_s, self.on_gpu = timeout_s, on_gpu
        # Separate connections: a blocked request blocks all users of its connection.
        self._store = store.clone()  # pyrefly: ignore[missing-attribute]
        self._store.set_timeout(timedelta(seconds=_KEY_TIMEOUT_S))
        connection = store.clone()  # pyrefly: ignore[missing-attribute]
        node = NodeRanks.of(rank, world_size=world_size, ranks_per_node=self._ranks_per_node)
        self._heartbeats = HeartbeatThread(connection, rank=rank, node=node, beat=self._beat)
        self._store_address, self._store_node_ranks = store_address, store_node_ranks
        self._state: Literal["gave up", "left"] | None = None
        self._error: str | None = None
        self._exit_code, self._is_reported = 0, False
        self._barriers = 0
        self._pid_namespace = pid_namespace()
        self._ended = threading.Event()
        self._main = threading.main_thread().ident
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)

    def start(self, *, wait_s: float) -> None:
        """Publish the first heartbeat and wait for one of every rank, before the first collective.

        Raises:
            CommError: naming the ranks that have not started within `wait_s`.
        """
        self._heartbeats.start()
        self._thread.start()
        end, pause_s = time.monotonic() + wait_s, 0.02
        try:
            while self._heartbeats.num_started(self._store) < self.world_size:
                if time.monotonic() > end:
                    late = reach_verdict(self._store, lambda: self._not_started(wait_s), deadline=nullcontext)
                    raise self._shared_error(late)
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, _MAX_POLL_S)
        except BaseException as error:  # ranks that start later must not wait for this one
            self.leave(error)
            raise

    def barrier(self) -> None:
        """Wait until every rank has come here, for as long as it takes while all are alive.

        Raises:
            TurnoutError: the error that ended another rank and that it reports itself, or a `CommError` if one is lost.
        """
        self._barriers += 1
        self._heartbeats.publish_now()
        key, number = f"barrier/{self._barriers}", self._barriers
        self._store.add(key, 1)

        def have_all_come(pause_s: float) -> bool:
            time.sleep(pause_s)
            return self._store.add(key, 0) >= self.world_size

        failure = "does not come to the barrier of all ranks"
        self._wait(have_all_come, is_awaited=lambda beat: beat.barriers < number, failure=failure)

    def wait_until(self, done: Callable[[float], bool]) -> None:
        """Wait for work that all ranks share in another thread, as `barrier` does; a `CommError` if a rank is lost.

        `done` waits for at most the given seconds, and returns whether the work is done.
        """
        self._wait(done, is_awaited=lambda beat: beat.state != "left" or beat.error is not None, failure="is gone")

    def _wait(self, done: Callable[[float], bool], *, is_awaited: Callable[[Heartbeat], bool], failure: str) -> None:
        pause_s, checked_at = 0.005, time.monotonic()
        last_change: dict[int, tuple[int, float]] = {}  # rank: (number of its last heartbeat, time it was first seen)
        while not done(pause_s):
            pause_s = min(2 * pause_s, _MAX_POLL_S)
            now = time.monotonic()
            if now - checked_at < _LIVENESS_CHECK_S:
                continue
            checked_at, beats = now, self._read(self._watched)
            if is_known(self._store):
                raise CommError(f"rank {self.rank}: another rank {failure}")
            for rank, beat in ((rank, beat) for rank, beat in beats.items() if is_awaited(beat)):
                if rank not in last_change or last_change[rank][0] != beat.number:
                    last_change[rank] = (beat.number, now)
                # On this host it has no process any more: no timeout need be waited for.
                has_vanished = beat.pid_namespace == self._pid_namespace and not is_alive(beat.pid)
                if has_vanished or beat.state in ("gave up", "left") or now - last_change[rank][1] > self.timeout_s:
                    raise CommError(f"rank {self.rank}: rank {rank} {failure}")

    def explain(self, error: CommError) -> TurnoutError:
        """Return the cause of a collective's failure on this rank: a lost rank, or another rank's error.

        One rank reports it; the others get a `RemoteRankError`.
        """
        waited_s = self.recorder.quiet_s
        self._state = "gave up"
        self._heartbeats.publish_now()
        silence_s = self._heartbeats.silence_s
        deadline = partial(
            exit_after, _STORE_DEADLINE_S, self._silence_of_store(error, _STORE_DEADLINE_S), CommError.exit_code
        )
        if silence_s > min(_STORE_DEADLINE_S, self.timeout_s / 2):
            return self._exit_soon(CommError(self._silence_of_store(error, silence_s)))
        try:

            def read() -> Mapping[int, Heartbeat]:
                with deadline():
                    return self._read(range(self.world_size))

            found = reach_verdict(self._store, lambda: find_cause(read, error, waited_s=waited_s), deadline=deadline)
            with deadline():
                return self._exit_soon(self._shared_error(found))
        except RuntimeError as lost:  # the store is lost as well
            text = f"{error}; torchrun's store does not answer either: the node that hosts it (the first) is lost"
            return self._exit_soon(CommError(f"{text} ({first_line(lost)})"))

    def _not_started(self, wait_s: float) -> Verdict:
        missing = [rank for rank in range(self.world_size) if not self._store.check([key_of(rank)])]
        text = (
            f"rank {self.rank}: ranks {missing} of {self.world_size} have not started within {wait_s:.0f} s; see their "
            "output, or that of their nodes"
        )
        return Verdict(text=text)

    def leave(self, error: BaseException | None = None) -> None:
        """Publish that this rank's run has ended, with the error if there was one."""
        self._state = "left"
        if error is not None:
            is_plain = isinstance(error, TurnoutError | StopRequested)
            self._error = str(error) if is_plain else "".join(traceback.format_exception_only(error)).strip()
            self._exit_code = error.exit_code if is_plain else 1
            reports = self.rank == 0 or (isinstance(error, TurnoutError) and error.is_rank_specific)
            self._is_reported = reports if is_plain else isinstance(error, Exception)  # with a traceback
        self._ended.set()
        self._heartbeats.stop(wait_s=_KEY_TIMEOUT_S)  # limited, since the store may be silent or lost
        self._thread.join()

    def as_shown(self, error: BaseException) -> BaseException:
        """Return the error that ended this rank's run, as it is shown: by one rank alone.

        Normally rank 0 has the same one; if it has not reported it for a while, this rank does, with its number.
        """
        if not isinstance(error, TurnoutError) or error.is_on_every_rank:
            return error
        try:
            if self.rank == 0 or error.is_rank_specific:
                self._store.add(_REPORTED, 1)
                return error
            end = time.monotonic() + _REPORT_S
            while time.monotonic() < end:
                with self._deadline(error):
                    if self._store.add(_REPORTED, 0) > 0:
                        return RemoteRankError(str(error), error.exit_code)
                time.sleep(_MAX_POLL_S)
            if self._store.add(_REPORTED, 1) > 1:
                return RemoteRankError(str(error), error.exit_code)
        except RuntimeError:  # the store is lost
            pass
        shown = type(error)(f"rank {self.rank}: {error}")
        shown.exit_code, shown.is_rank_specific = error.exit_code, True
        return shown

    def _deadline(self, error: TurnoutError) -> AbstractContextManager[object]:
        return exit_after(_STORE_DEADLINE_S, f"rank {self.rank}: {error}", error.exit_code)

    def _shared_error(self, verdict: Verdict) -> TurnoutError:
        """Return the error: to be shown on the first rank that asks, silent on the others or if already reported."""
        if verdict.is_reported or self._store.add(_REPORTED, 1) > 1:
            return RemoteRankError(verdict.text, verdict.exit_code)
        error = CommError(verdict.text)
        error.exit_code = verdict.exit_code
        return error

    def _exit_soon(self, error: TurnoutError) -> TurnoutError:
        """Make sure that the process exits soon, even if a broken process group blocks it; return the error."""
        timer = threading.Timer(_EXIT_S, exit_now, [None, error.exit_code])
        timer.daemon = True
        timer.start()
        return error

    def _run(self) -> None:
        """End the process if a collective or the store exceeds its timeout."""
        while not self._ended.wait(_CHECK_S):
            if self._state is not None:  # the main thread looks for the cause, with a deadline
                continue
            waits = self.recorder.running is not None or (self.on_gpu and self.recorder.is_in_step)
            if waits and self.recorder.quiet_s > self.timeout_s + _GRACE_S:
                shown = self.explain(CommError(f"rank {self.rank}: {self._last()} did not complete"))
                exit_now(None if isinstance(shown, RemoteRankError) else str(shown), shown.exit_code)
            if self._heartbeats.silence_s > self.timeout_s:
                self._state = "gave up"
                error = CommError(f"rank {self.rank}: {self._last()} was its last collective")
                exit_now(self._silence_of_store(error, self._heartbeats.silence_s), CommError.exit_code)

    def _beat(self, number: int) -> Heartbeat:
        recorder = self.recorder
        return Heartbeat(
            number=number,
            state=self._state or ("waits" if recorder.running is not None else "works"),
            step=recorder.step,
            phase=recorder.phase,
            where="" if self._state else _where(sys._current_frames().get(self._main or 0)),
            count=recorder.count,
            operations=[str(operation) for operation in list(recorder.operations)[-MAX_OPERATIONS_SHOWN:]],
            barriers=self._barriers,
            error=self._error,
            exit_code=self._exit_code,
            is_reported=self._is_reported,
            pid_namespace=self._pid_namespace,
            pid=os.getpid(),
        )

    def _silence_of_store(self, error: CommError, silence_s: float) -> str:
        """Return a message that names the ranks on the silent store's host, as far as this rank knows them."""
        step, phase, lost = self.recorder.step, self.recorder.phase, self._store_node_ranks
        text = diagnose_lost_store(self._store_address, lost, silence_s=silence_s, step=step, phase=phase)
        return f"{text}\n  noticed by {error}"

    def _read(self, ranks: Sequence[int]) -> dict[int, Heartbeat]:
        return read_heartbeats(self._store, ranks, world_size=self.world_size, ranks_per_node=self._ranks_per_node)

    def _last(self) -> str:
        operations = list(self.recorder.operations)
        return str(operations[-1]) if operations else "the first collective"


def _where(frame: FrameType | None) -> str:
    """Return file and line of the innermost frame in this package, outside trainer/distributed."""
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(_PACKAGE) and not name.startswith(_THIS_FOLDER):
            return f"{os.path.relpath(name, _PACKAGE)}:{frame.f_lineno}"
        frame = frame.f_back
    return ""
