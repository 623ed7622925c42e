"""This rank's beats in the store, once a second, from a thread of its own that also knows whether the store answers."""

import threading
import time
from collections.abc import Callable

import torch.distributed as dist

from trainer.distributed.heartbeat import Heartbeat

_BEAT_S = 1.0


def key_of(rank: int) -> str:
    """Return the key of a rank's last beat."""
    return f"beat/{rank}"


class HeartbeatThread:
    """Publishes beats. Nobody else of this process writes them, so that a later one is never overwritten."""

    def __init__(self, store: dist.Store, *, rank: int, beat: Callable[[int], Heartbeat]) -> None:
        """Prepare.

        Args:
            store: a connection that nobody else uses: one that waits for an answer makes the others wait as well.
            rank: this one.
            beat: describes this rank now; is given the beat's number.
        """
        self._store, self._rank, self._describe = store, rank, beat
        self._asked_at: float | None = None
        self._is_last = False
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="pulse", daemon=True)

    def start(self) -> None:
        """Publish the first beat, and go on."""
        self._thread.start()

    def hurry(self) -> None:
        """Publish the next beat now: something has changed that others should know."""
        self._wake.set()

    def stop(self, *, wait_s: float) -> None:
        """Publish a last beat, if the store takes it in time."""
        self._is_last = True
        self._wake.set()
        self._thread.join(wait_s)

    @property
    def silence_s(self) -> float:
        """Seconds for which the store has owed an answer; 0 where it owes none, or its end is known."""
        asked_at = self._asked_at
        return 0.0 if asked_at is None else time.monotonic() - asked_at

    def _run(self) -> None:
        number, key = 0, key_of(self._rank)
        is_last = False
        while not is_last:
            number, is_last = number + 1, self._is_last
            self._wake.clear()
            self._asked_at = time.monotonic()
            try:
                self._store.set(key, self._describe(number).to_json())
                self._store.check([key])  # the one above is not answered
            except RuntimeError:  # the store is lost, and with it torchrun: an exchange will fail soon
                is_last = True
            self._asked_at = None
            if not is_last:
                self._wake.wait(_BEAT_S)
