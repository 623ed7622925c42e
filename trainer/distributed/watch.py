"""Who is missing when ranks wait for each other.

Every rank publishes a beat a second in torchrun's store, from a thread of its own. Nobody reads them while all is well
and nobody is waited for. A rank whose exchange fails reads them twice, names those that have gone silent, and ends; so
does one whose exchange never comes back.
"""

import contextlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Literal

import torch.distributed as dist

from trainer.distributed.beats import Beat, silent_ranks, verdict
from trainer.distributed.journal import Journal
from trainer.distributed.process import home, is_alive
from trainer.errors import CommError, ElsewhereError, Stopped, TurnoutError, first_line
from trainer.terminal import say

_BEAT_S, _LISTEN_S = 1.0, 2.5
"""Between beats; between two readings, so that a living rank's beat changes for certain."""
_LOOK_S = 2.0
"""Between looks at who lives, while a meeting is waited for."""
_ANSWER_S = 5.0
"""The store has so long to answer."""
_GRACE_S = 1.0
"""An exchange that does not end by itself at its timeout is ended from outside so much later."""
_EXIT_S = 2.0
"""A rank that gave up has so long to end in good order."""
_SOURCE = str(Path(__file__).parents[1])
_HERE = str(Path(__file__).parent)


class Watch:
    """One rank's part in watching over all of them."""

    def __init__(
        self, store: dist.Store, *, rank: int, world_size: int, journal: Journal, timeout_s: float, on_gpu: bool = False
    ) -> None:
        """Prepare.

        Args:
            store: that of this attempt, shared by all ranks.
            rank: this one.
            world_size: how many there are.
            journal: what this rank does.
            timeout_s: how long one exchange may take.
            on_gpu: exchanges return at once and are waited for elsewhere, so that a quiet journal in the middle of a
                step counts as waiting.
        """
        self.rank, self.world_size, self.journal = rank, world_size, journal
        self.timeout_s, self.on_gpu = timeout_s, on_gpu
        # Connections of its own: one that waits for an answer would make the others wait as well.
        self._store, self._thread_store = store.clone(), store.clone()  # pyrefly: ignore[missing-attribute]
        for mine in (self._store, self._thread_store):
            mine.set_timeout(timedelta(seconds=_ANSWER_S))
        self._state: Literal["gave up", "left"] | None = None
        self._error: str | None = None
        self._exit_code, self._has_said = 0, False
        self._number = self._meetings = 0
        self._home = home()
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._main = threading.main_thread().ident
        self._thread = threading.Thread(target=self._beat, name="watch", daemon=True)

    def start(self, *, wait_s: float) -> None:
        """Publish the first beat and wait for that of every rank, before the first exchange.

        Raises:
            CommError: naming the ranks that have not started within `wait_s`.
        """
        self._publish(self._store)
        self._thread.start()
        missing, end = set(range(self.world_size)), time.monotonic() + wait_s
        try:
            while missing:
                missing = {rank for rank in missing if not self._store.check([f"beat/{rank}"])}
                if missing and time.monotonic() > end:
                    raise CommError(
                        f"rank {self.rank}: ranks {sorted(missing)} of {self.world_size} have not started within "
                        f"{wait_s:.0f} s; look at what they, or their nodes, say"
                    )
                time.sleep(0.02 if missing else 0)
        except BaseException as error:  # those that come later must not wait for this one
            self.leave(error)
            raise

    def meet(self) -> None:
        """Wait until every rank has come here, for as long as it takes while all are alive.

        Raises:
            TurnoutError: what ended another rank (silent, that rank says it), or a `CommError` if one is lost.
        """
        self._meetings += 1
        self._publish(self._store)
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

    def _wait(self, done: Callable[[float], bool], *, is_awaited: Callable[[Beat], bool], failing: str) -> None:
        pause, looked = 0.005, time.monotonic()
        heard: dict[int, tuple[int, float]] = {}  # rank: its last beat's number, and when it changed
        while not done(pause):
            pause = min(2 * pause, _BEAT_S / 2)
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

        One rank says it; the others get an `ElsewhereError`.
        """
        waited_s = self.journal.quiet_s
        self._state = "gave up"
        try:
            self._publish(self._store)
            before = self._read()
            time.sleep(_LISTEN_S)
            beats = self._read()
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
            is_plain = isinstance(error, TurnoutError | Stopped)
            self._error = str(error) if is_plain else "".join(traceback.format_exception_only(error)).strip()
            self._exit_code = error.exit_code if is_plain else 1
            speaks = self.rank == 0 or (isinstance(error, TurnoutError) and error.is_this_ranks)
            self._has_said = speaks if is_plain else isinstance(error, Exception)  # with a traceback
        with contextlib.suppress(RuntimeError):  # nobody can be told
            self._publish(self._store)
        self._ended.set()
        self._thread.join()

    def _of_another(self, text: str, exit_code: int, has_said: bool) -> TurnoutError:
        """Return an error to show, on the first rank to ask if nobody has said it, or to end with in silence."""
        if has_said or self._store.add("said", 1) > 1:
            return ElsewhereError(text, exit_code)
        error = CommError(text)
        error.exit_code = exit_code
        return error

    def _end(self, error: TurnoutError) -> TurnoutError:
        """Make sure that the process ends soon, whatever a broken group still waits for."""
        timer = threading.Timer(_EXIT_S, os._exit, [error.exit_code])
        timer.daemon = True
        timer.start()
        return error

    def _beat(self) -> None:
        while not self._ended.wait(_BEAT_S):
            try:
                self._publish(self._thread_store)
            except RuntimeError:  # the store is lost, and with it torchrun: an exchange will fail soon
                return
            waits = self.journal.running is not None or (self.on_gpu and self.journal.is_in_step)
            if waits and self._state is None and self.journal.quiet_s > self.timeout_s + _GRACE_S:
                shown = self.explain(CommError(f"rank {self.rank}: {self._last()} did not come back"))
                if not isinstance(shown, ElsewhereError):
                    say(shown, file=sys.stderr)
                os._exit(shown.exit_code)

    def _publish(self, store: dist.Store) -> None:
        with self._lock:
            self._number += 1
            journal = self.journal
            beat = Beat(
                number=self._number,
                state=self._state or ("waits" if journal.running is not None else "works"),
                step=journal.step,
                phase=journal.phase,
                where="" if self._state else _where(sys._current_frames().get(self._main or 0)),
                count=journal.count,
                operations=[str(operation) for operation in list(journal.operations)[-8:]],
                meetings=self._meetings,
                error=self._error,
                exit_code=self._exit_code,
                has_said=self._has_said,
                home=self._home,
                pid=os.getpid(),
            )
            store.set(f"beat/{self.rank}", beat.to_json())

    def _has_vanished(self, beat: Beat) -> bool:
        """Tell whether a rank of this machine has no process any more: its silence need not be waited for."""
        return beat.home == self._home and not is_alive(beat.pid)

    def _read(self) -> dict[int, Beat]:
        texts = self._store.multi_get([f"beat/{rank}" for rank in range(self.world_size)])
        return {rank: Beat.from_json(text) for rank, text in enumerate(texts)}

    def _last(self) -> str:
        operations = list(self.journal.operations)
        return str(operations[-1]) if operations else "the first exchange"


def _where(frame: FrameType | None) -> str:
    """Return file and line of the innermost call of this project that is not about exchanging itself."""
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(_SOURCE) and not name.startswith(_HERE):
            return f"{os.path.relpath(name, _SOURCE)}:{frame.f_lineno}"
        frame = frame.f_back
    return ""
