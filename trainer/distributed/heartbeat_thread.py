"""Publish this rank's heartbeat in the store, and measure how long the store has not answered.

A rank's own key has its first and last heartbeat, and those after a change that others wait for. In between, ranks of
one node write theirs to a board, and about once a second one of them publishes all under the node's key: what reaches
the store while all is well grows with the nodes. The newer of both is a rank's heartbeat.
"""

import json
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch.distributed as dist

from trainer.distributed.heartbeat import Heartbeat
from trainer.distributed.heartbeat_board import HeartbeatBoard

_BEAT_S, _OWN_BEAT_S = 0.5, 1.0
"""Intervals of heartbeats on a board, and in the store by a rank that has none."""
_PUBLISH_S = 0.5
"""Shortest interval of a node's publications; the longest is this and an interval of heartbeats."""
_STARTED = "started"


def key_of(rank: int) -> str:
    """Return the store key of a rank's own heartbeat."""
    return f"beat/{rank}"


@dataclass(frozen=True, slots=True)
class NodeRanks:
    """A node's ranks."""

    first: int
    num_ranks: int

    @classmethod
    def of(cls, rank: int, *, world_size: int, ranks_per_node: int) -> "NodeRanks":
        """Return the node of a rank."""
        first = rank - rank % ranks_per_node
        return cls(first, min(ranks_per_node, world_size - first))

    @property
    def key(self) -> str:
        """Store key of the heartbeats of all."""
        return f"beats/{self.first}"

    @property
    def board_key(self) -> str:
        """Store key of the board's path."""
        return f"board/{self.first}"


def read_heartbeats(
    store: dist.Store, ranks: Iterable[int], *, world_size: int, ranks_per_node: int
) -> dict[int, Heartbeat]:
    """Read the newest heartbeats of ranks that have started."""
    ranks = list(ranks)
    nodes = {rank: NodeRanks.of(rank, world_size=world_size, ranks_per_node=ranks_per_node) for rank in ranks}
    shared = list(dict.fromkeys(node for node in nodes.values() if node.num_ranks > 1))
    texts = store.multi_get([*map(key_of, ranks), *(node.key for node in shared)])
    of_nodes = dict(zip(shared, map(json.loads, texts[len(ranks) :]), strict=True))
    found = {}
    for rank, text in zip(ranks, texts, strict=False):
        found[rank] = Heartbeat.from_json(text)
        together = of_nodes.get(nodes[rank], {}).get(str(rank - nodes[rank].first))
        if together is not None and together["number"] > found[rank].number:
            found[rank] = Heartbeat(**together)
    return found


class HeartbeatThread:
    """Publishes heartbeats; the only writer of this rank's keys, so that an older one never overwrites a newer one.

    `store` is a connection of its own, since a blocked request blocks all users of a connection. `beat` returns the
    current heartbeat with a given number.
    """

    def __init__(self, store: dist.Store, *, rank: int, node: NodeRanks, beat: Callable[[int], Heartbeat]) -> None:
        self._store, self._rank, self._node, self._beat = store, rank, node, beat
        self._board: HeartbeatBoard | None = None
        self._may_have_board = node.num_ranks > 1
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
        number, is_last = 0, False
        while not is_last:
            number, is_last, is_news = number + 1, self._is_last, self._wake.is_set()
            self._wake.clear()
            self._asked_at = time.monotonic()
            try:
                if number == 1:
                    self._make_board()
                self._publish(self._beat(number).to_json(), is_news=is_news or is_last or number == 1)
                if number == 1:
                    self._store.add(_STARTED, 1)
            except RuntimeError:  # the store is lost, and torchrun with it: a collective will fail soon
                is_last = True
            self._asked_at = None
            if not is_last:
                self._wake.wait(_OWN_BEAT_S if self._board is None else _BEAT_S)
        if self._board is not None:
            self._board.close()

    def _publish(self, text: str, *, is_news: bool) -> None:
        """Write a heartbeat to the board, and publish it if it is news, or those of all if it is time to."""
        board = self._open_board()
        try:
            if board is not None:
                board.write(text)
                if not is_news:
                    if board.is_due(_PUBLISH_S):
                        self._set(self._node.key, json.dumps(board.read()))
                        board.mark_published()
                    return
        except OSError:  # its file system has failed
            self._board, self._may_have_board = None, False
        self._set(key_of(self._rank), text)

    def _set(self, key: str, text: str) -> None:
        self._store.set(key, text)
        self._store.check([key])  # `set` does not wait for an answer

    def _make_board(self) -> None:
        """Make the board, if this is the first rank of its node."""
        if not self._may_have_board or self._rank != self._node.first:
            return
        try:
            self._board = HeartbeatBoard.create(num_ranks=self._node.num_ranks, index=0)
        except OSError:
            self._may_have_board = False
        self._store.set(self._node.key, "{}")
        self._store.set(self._node.board_key, "" if self._board is None else self._board.path or "")

    def _open_board(self) -> HeartbeatBoard | None:
        """Return the board, once the first rank of the node has made one."""
        if self._board is None and self._may_have_board and self._store.check([self._node.board_key]):
            path = self._store.get(self._node.board_key).decode()
            self._may_have_board = path != ""
            if self._may_have_board:
                try:
                    index = self._rank - self._node.first
                    self._board = HeartbeatBoard.open(path, num_ranks=self._node.num_ranks, index=index)
                except OSError:  # the ranks do not share a file system
                    self._may_have_board = False
        return self._board
