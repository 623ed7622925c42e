"""Publish this rank's heartbeat in the store once a second, and measure how long the store has not answered."""

import threading
import time
from collections.abc import Callable

import torch.distributed as dist

from trainer.distributed.heartbeat import Heartbeat

_BEAT_S = 1.0
_STARTED = "started"


def key_of(rank: int) -> str:
    """Return the store key of a rank's last heartbeat."""
    return f"beat/{rank}"


class HeartbeatThread:
    """Publishes heartbeats; the only writer of this rank's key, so that an older one never overwrites a newer one.

    `store` is a connection of its own, since a blocked request blocks all users of a connection. `beat` returns the
    current heartbeat with a given number.
    """

    def __init__(self, store: dist.Store, *, rank: int, beat: Callable[[int], Heartbeat]) -> None:
        self._store, self._rank, self._beat = store, rank, beat
        self._asked_at: float | None = None
        self._is_last = False
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Start to publish."""
        self._thread.start()

    def publish_now(self) -> None:
        """Publish the next heartbeat at once, after a change that other ranks wait for."""
        self._wake.set()

    def stop(self, *, wait_s: float) -> None:
        """Publish a last heartbeat, if the store accepts it in time."""
        self._is_last = True
        self._wake.set()
        self._thread.join(wait_s)

    @staticmethod
    def num_started(store: dist.Store) -> int:
        """Return how many ranks have published a heartbeat."""
        return store.add(_STARTED, 0)

    @property
    def silence_s(self) -> float:
        """Seconds for which the store has not answered; 0 if no request is pending or the store is known to be lost."""
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
                self._store.set(key, self._beat(number).to_json())
                if number == 1:
                    self._store.add(_STARTED, 1)
                self._store.check([key])  # `set` does not wait for an answer
            except RuntimeError:  # the store is lost, and torchrun with it: a collective will fail soon
                is_last = True
            self._asked_at = None
            if not is_last:
                self._wake.wait(_BEAT_S)
