"""Why a run ends, found by one rank and read by all: what a rank reads of others does not grow with their number.

Each rank watches a few others. The first one that gives up reads the heartbeats of all, twice, and publishes the cause
in the store; the others, which give up as well, wait for it. If that rank ends meanwhile, the next one takes its place.
"""

import json
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass

import torch.distributed as dist

from trainer.distributed.heartbeat import Heartbeat, diagnose_lost_ranks, silent_ranks
from trainer.errors import CommError

_KEY, _TURN = "verdict", "verdict/turn"
_MAX_TURNS = 3
_TURN_S = 7.0  # for another rank's verdict, which takes _SETTLE_S, _READ_INTERVAL_S and two readings
_READ_INTERVAL_S = 2.5
"""Pause between two readings of the heartbeats, in which a living rank's heartbeat is certain to change."""
_SETTLE_S = 1.0
"""Time in which what a lost rank had written for its node is published, so that two readings do not differ by it."""
_POLL_S = 0.2
_MAX_WATCHED = 16  # of this node


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Cause of the end of a run."""

    text: str
    exit_code: int = CommError.exit_code
    is_reported: bool = False
    """Shown already, by the rank whose error it is."""


def watched_ranks(rank: int, *, world_size: int, ranks_per_node: int) -> list[int]:
    """Return the ranks that a rank watches: those of its node, at most 16 after it, and its like on the next node.

    So whatever part of the ranks is lost, one that remains watches one of them.
    """
    first = rank - rank % ranks_per_node
    size = min(ranks_per_node, world_size - first)
    here = [first + (rank - first + step) % size for step in range(1, min(size, _MAX_WATCHED + 1))]
    return sorted({*here, (rank + ranks_per_node) % world_size} - {rank})


def is_known(store: dist.Store) -> bool:
    """Return whether there is a verdict, so that the run ends."""
    return store.check([_KEY])


def reach_verdict(
    store: dist.Store, find: Callable[[], Verdict], *, deadline: Callable[[], AbstractContextManager[object]]
) -> Verdict:
    """Return the verdict of the first rank that asked: it calls `find`. Requests to the store have a `deadline`.

    Raises:
        RuntimeError: if the store is lost.
    """
    for turn in range(_MAX_TURNS):
        end = time.monotonic() + _TURN_S
        with deadline():
            has_turn = not is_known(store) and store.add(f"{_TURN}/{turn}", 1) == 1
        if has_turn:
            found = find()
            with deadline():
                store.set(_KEY, json.dumps(asdict(found)))
            return found
        while time.monotonic() < end:
            with deadline():
                if is_known(store):
                    return Verdict(**json.loads(store.get(_KEY)))
            time.sleep(_POLL_S)
    return find()


def find_cause(read: Callable[[], Mapping[int, Heartbeat]], error: CommError, *, waited_s: float) -> Verdict:
    """Return why the run ends, from two readings of all heartbeats.

    The rank noticed it by `error`, after it had waited for the collective for `waited_s`.
    """
    time.sleep(_SETTLE_S)
    before = read()
    time.sleep(_READ_INTERVAL_S)
    beats = read()
    for rank, beat in beats.items():
        if beat.state == "left" and beat.error is not None:
            text = f"rank {rank}: {beat.error}"
            return Verdict(text=text, exit_code=beat.exit_code, is_reported=beat.is_reported)
    silent = silent_ranks(before, beats)
    text = diagnose_lost_ranks(beats, silent, silence_s=_READ_INTERVAL_S, waited_s=waited_s)
    return Verdict(text=f"{text}\n  noticed by {error}")
