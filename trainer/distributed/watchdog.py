"""Watchdog that names missing ranks when others wait for them.

Every rank publishes a beat a second in torchrun's store (`pulse`). Nobody reads them while all is well and nobody is
waited for. A rank whose exchange fails reads them twice, names those that have gone silent, and ends; so does one whose
exchange never comes back.

The store may fall silent as well, when its machine freezes or is cut off, and whoever asks it then waits for ever,
whatever timeout torch was given. So the thread that looks after this rank asks it nothing while all is well, and every
question that is asked when something is wrong has a deadline, which is set first.
"""

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Literal

import torch.distributed as dist

from trainer.distributed.deadline import exit_after, exit_now
from trainer.distributed.flight_recorder import FlightRecorder
from trainer.distributed.heartbeat import Heartbeat, diagnose_lost_store, silent_ranks, verdict
from trainer.distributed.heartbeat_thread import HeartbeatThread, key_of
from trainer.distributed.process import home, is_alive
from trainer.errors import CommError, RemoteRankError, StopRequested, TurnoutError, first_line

_LISTEN_S = 2.5
"""Between two readings, so that a living rank's beat changes for certain."""
_LOOK_S, _LONGEST_PAUSE_S = 2.0, 0.5
"""Between looks at who lives, while a meeting is waited for; between questions whether all have come."""
_ANSWER_S = 4.0
"""The store has so long to answer when this rank has given up, unless it was silent before."""
_KEY_S = 5.0
"""A beat that should be in the store has so long to appear."""
_GUARD_S = 0.25
_GRACE_S = 1.0
"""An exchange that does not end by itself at its timeout is ended from outside so much later."""
_EXIT_S = 2.0
"""A rank that gave up has so long to end in good order."""
_SOURCE = str(Path(__file__).parents[1])
_HERE = str(Path(__file__).parent)


class Watchdog:
    """One rank's part in watching over all of them."""

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
        beside_store: Sequence[int] = (),
    ) -> None:
        """Prepare.

        Args:
            store: that of this attempt, shared by all ranks.
            rank: this one.
            world_size: how many there are.
            recorder: what this rank does.
            timeout_s: how long one exchange may take.
            on_gpu: exchanges return at once and are waited for elsewhere, so that a quiet journal in the middle of a
                step counts as waiting.
            store_address: where the store is, for messages.
            beside_store: ranks of the machine that the store is on, if this is not one of them.
        """
        self.rank, self.world_size, self.recorder = rank, world_size, recorder
        self.timeout_s, self.on_gpu = timeout_s, on_gpu
        # Connections of its own: one that waits for an answer would make the others wait as well.
        self._store = store.clone()  # pyrefly: ignore[missing-attribute]
        self._store.set_timeout(timedelta(seconds=_KEY_S))
        self._pulse = HeartbeatThread(store.clone(), rank=rank, beat=self._beat)  # pyrefly: ignore[missing-attribute]
        self._store_address, self._beside_store = store_address, beside_store
        self._state: Literal["gave up", "left"] | None = None
        self._error: str | None = None
        self._exit_code, self._has_said = 0, False
        self._meetings = 0
        self._home = home()
        self._ended = threading.Event()
        self._main = threading.main_thread().ident
        self._thread = threading.Thread(target=self._guard, name="watch", daemon=True)

    def start(self, *, wait_s: float) -> None:
        """Publish the first beat and wait for that of every rank, before the first exchange.

        Raises:
            CommError: naming the ranks that have not started within `wait_s`.
        """
        self._pulse.start()
        self._thread.start()
        missing, end = set(range(self.world_size)), time.monotonic() + wait_s
        try:
            while missing:
                missing = {rank for rank in missing if not self._store.check([key_of(rank)])}
                if missing and time.monotonic() > end:
                    raise CommError(
                        f"rank {self.rank}: ranks {sorted(missing)} of {self.world_size} have not started within "
                        f"{wait_s:.0f} s; look at what they, or their nodes, say"
                    )
                time.sleep(0.02 if missing else 0)
        except BaseException as error:  # those that come later must not wait for this one
            self.leave(error)
            raise

    def barrier(self) -> None:
        """Wait until every rank has come here, for as long as it takes while all are alive.

        Raises:
            TurnoutError: what ended another rank (silent, that rank says it), or a `CommError` if one is lost.
        """
        self._meetings += 1
        self._pulse.hurry()
        key, number = f"meeting/{self._meetings}", self._meetings
        self._store.add(key, 1)

        def all_came(pause_s: float) -> bool:
            time.sleep(pause_s)
            return self._store.add(key, 0) >= self.world_size

        self._wait(
            all_came,
            is_awaited=lambda beat: beat.meetings < number,
            failing="does not come to the meeting of all ranks",
        )

    def wait_until(self, done: Callable[[float], bool]) -> None:
        """Wait for what all ranks do together elsewhere, for as long as it takes while all are alive.

        Args:
            done: waits at most so many seconds, and tells whether all have done their part.

        Raises:
            CommError: if a rank is lost.
        """
        self._wait(done, is_awaited=lambda beat: beat.state != "left" or beat.error is not None, failing="is gone")

    def _wait(self, done: Callable[[float], bool], *, is_awaited: Callable[[Heartbeat], bool], failing: str) -> None:
        pause, looked = 0.005, time.monotonic()
        heard: dict[int, tuple[int, float]] = {}  # rank: its last beat's number, and when it changed
        while not done(pause):
            pause = min(2 * pause, _LONGEST_PAUSE_S)
            now = time.monotonic()
            if now - looked < _LOOK_S:
                continue
            looked, beats = now, self._read()
            for rank in (rank for rank, beat in beats.items() if is_awaited(beat)):
                if rank not in heard or heard[rank][0] != beats[rank].number:
                    heard[rank] = (beats[rank].number, now)
                is_gone = beats[rank].state in ("gave up", "left") or self._has_vanished(beats[rank])
                if is_gone or now - heard[rank][1] > self.timeout_s:
                    raise CommError(f"rank {self.rank}: rank {rank} {failing}")

    def explain(self, error: CommError) -> TurnoutError:
        """Return what really happened when an exchange failed on this rank: who is missing, or whose error it was.

        One rank says it; the others get an `RemoteRankError`.
        """
        waited_s = self.recorder.quiet_s
        self._state = "gave up"
        self._pulse.hurry()
        if self._pulse.silence_s > min(_ANSWER_S, self.timeout_s / 2):
            return self._end(CommError(self._silence_of_store(error, self._pulse.silence_s)))
        try:
            before = self._read_or_end(error)
            time.sleep(_LISTEN_S)
            beats = self._read_or_end(error)
            for rank, beat in beats.items():
                if beat.state == "left" and beat.error is not None:
                    return self._end(self._of_another(f"rank {rank}: {beat.error}", beat.exit_code, beat.has_said))
            silent = silent_ranks(before, beats)
            text = verdict(beats, silent, silence_s=_LISTEN_S, waited_s=waited_s)
            text = f"{text}\n  noticed by {error}"
            return self._end(self._of_another(text, CommError.exit_code, has_said=False))
        except RuntimeError as lost:  # the store as well
            text = f"{error}; torchrun's store does not answer either: the node that hosts it (the first) is lost"
            return self._end(CommError(f"{text} ({first_line(lost)})"))

    def leave(self, error: BaseException | None = None) -> None:
        """Tell the others that this rank's run has ended, and why if not at its end."""
        self._state = "left"
        if error is not None:
            is_plain = isinstance(error, TurnoutError | StopRequested)
            self._error = str(error) if is_plain else "".join(traceback.format_exception_only(error)).strip()
            self._exit_code = error.exit_code if is_plain else 1
            speaks = self.rank == 0 or (isinstance(error, TurnoutError) and error.is_rank_specific)
            self._has_said = speaks if is_plain else isinstance(error, Exception)  # with a traceback
        self._ended.set()
        self._pulse.stop(wait_s=_KEY_S)  # a store that is silent or lost tells nobody
        self._thread.join()

    def _of_another(self, text: str, exit_code: int, has_said: bool) -> TurnoutError:
        """Return an error to show, on the first rank to ask if nobody has said it, or to end with in silence."""
        if has_said or self._is_said(text):
            return RemoteRankError(text, exit_code)
        error = CommError(text)
        error.exit_code = exit_code
        return error

    def _end(self, error: TurnoutError) -> TurnoutError:
        """Make sure that the process ends soon, whatever a broken group still waits for."""
        timer = threading.Timer(_EXIT_S, exit_now, [None, error.exit_code])
        timer.daemon = True
        timer.start()
        return error

    def _guard(self) -> None:
        """End the process if it waits for what does not come: an exchange, or an answer of the store."""
        while not self._ended.wait(_GUARD_S):
            if self._state is not None:  # the main thread asks what has happened, and has a deadline
                continue
            waits = self.recorder.running is not None or (self.on_gpu and self.recorder.is_in_step)
            if waits and self.recorder.quiet_s > self.timeout_s + _GRACE_S:
                shown = self.explain(CommError(f"rank {self.rank}: {self._last()} did not come back"))
                exit_now(None if isinstance(shown, RemoteRankError) else str(shown), shown.exit_code)
            if self._pulse.silence_s > self.timeout_s:
                self._state = "gave up"
                error = CommError(f"rank {self.rank}: {self._last()} was its last exchange")
                exit_now(self._silence_of_store(error, self._pulse.silence_s), CommError.exit_code)

    def _beat(self, number: int) -> Heartbeat:
        recorder = self.recorder
        return Heartbeat(
            number=number,
            state=self._state or ("waits" if recorder.running is not None else "works"),
            step=recorder.step,
            phase=recorder.phase,
            where="" if self._state else _where(sys._current_frames().get(self._main or 0)),
            count=recorder.count,
            operations=[str(operation) for operation in list(recorder.operations)[-8:]],
            meetings=self._meetings,
            error=self._error,
            exit_code=self._exit_code,
            has_said=self._has_said,
            home=self._home,
            pid=os.getpid(),
        )

    def _silence_of_store(self, error: CommError, silence_s: float) -> str:
        """Say whose machine is lost when the store is silent, as far as this rank can tell."""
        step, phase = self.recorder.step, self.recorder.phase
        text = diagnose_lost_store(self._store_address, self._beside_store, silence_s=silence_s, step=step, phase=phase)
        return f"{text}\n  noticed by {error}"

    def _has_vanished(self, beat: Heartbeat) -> bool:
        """Tell whether a rank of this machine has no process any more: its silence need not be waited for."""
        return beat.home == self._home and not is_alive(beat.pid)

    def _read(self) -> dict[int, Heartbeat]:
        texts = self._store.multi_get([key_of(rank) for rank in range(self.world_size)])
        return {rank: Heartbeat.from_json(text) for rank, text in enumerate(texts)}

    def _read_or_end(self, error: CommError) -> dict[int, Heartbeat]:
        with exit_after(_ANSWER_S, self._silence_of_store(error, _ANSWER_S), CommError.exit_code):
            return self._read()

    def _is_said(self, text: str) -> bool:
        """Ask whether another rank has said what is wrong; who asks first says it."""
        with exit_after(_ANSWER_S, text, CommError.exit_code):
            return self._store.add("said", 1) > 1

    def _last(self) -> str:
        operations = list(self.recorder.operations)
        return str(operations[-1]) if operations else "the first exchange"


def _where(frame: FrameType | None) -> str:
    """Return file and line of the innermost call of this project that is not about exchanging itself."""
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(_SOURCE) and not name.startswith(_HERE):
            return f"{os.path.relpath(name, _SOURCE)}:{frame.f_lineno}"
        frame = frame.f_back
    return ""
