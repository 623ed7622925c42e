"""What a rank exchanges grows at most as docs/scale.md says: with the logarithm of the ranks, or by some bytes a rank.

The real code of every rank, in threads; messages and bytes are counted by the usual algorithms of collectives.
"""

import json
import math
from typing import Any, NamedTuple

import pytest

from tests.counted_traffic import count
from tests.simulated_ranks import Traffic
from trainer.distributed import verdict, watchdog
from trainer.distributed.flight_recorder import FlightRecorder
from trainer.distributed.heartbeat import Heartbeat
from trainer.distributed.heartbeat_thread import key_of
from trainer.distributed.watchdog import Watchdog
from trainer.errors import CommError, RemoteRankError

_FEW, _MANY = 16, 64
_BYTES_A_RANK = {"log a step": 100, "first save": 120, "save": 90}
"""What rank 0 receives from every other rank."""


class Counted(NamedTuple):
    """What few and many ranks exchange, by phase."""

    num_few: int
    num_many: int
    few: dict[str, list[Traffic]]
    many: dict[str, list[Traffic]]


@pytest.fixture(scope="module", params=[1, 2], ids=["no stages", "two stages"])
def counted(request: pytest.FixtureRequest) -> Counted:
    sizes = _FEW * request.param, _MANY * request.param
    few, many = ({k: v for k, (v, _) in count(n, is_sharded=True, pp_size=request.param).items()} for n in sizes)
    return Counted(*sizes, few, many)


def test_a_rank_sends_as_many_messages_as_trees_are_deep(counted: Counted) -> None:
    for name, few in counted.few.items():
        many = counted.many[name]
        for rank in (1, -1):
            assert many[rank].calls == few[rank].calls, f"{name}: calls grow with the ranks"
            assert many[rank].messages <= 2 * math.ceil(math.log2(counted.num_many)) * many[rank].calls.total(), name
        gathered = many[0].calls["gather"] * (counted.num_many - 1)
        assert many[0].messages <= many[1].messages + gathered, name


def test_what_a_rank_receives_does_not_grow_but_for_stated_bytes(counted: Counted) -> None:
    for name, few in counted.few.items():
        many, more = counted.many[name], counted.num_many - counted.num_few
        allowed = _BYTES_A_RANK.get(name, 0) * more
        assert many[0].received_bytes <= few[0].received_bytes + allowed, name
        # With more ranks there are copies of experts, whose groups compare them and share the writing.
        assert many[1].received_bytes <= 2 * few[1].received_bytes, name


class CountedStore:
    """Store in memory in which all other ranks are well; counts the requests of this one, and their bytes."""

    def __init__(self, world_size: int) -> None:
        beat = Heartbeat(number=1, state="works", step=1, phase="data", where="", count=1, operations=[], barriers=0)
        self.values = {key_of(rank): beat.to_json() for rank in range(world_size)}
        together = json.dumps({str(index): json.loads(beat.to_json()) for index in range(8)})
        self.values |= {f"beats/{first}": together for first in range(0, world_size, 8)}
        self.counters = {"started": world_size - 1}
        self.requests, self.num_bytes = 0, 0

    def clone(self) -> "CountedStore":
        return self

    def set_timeout(self, _: Any) -> None:
        pass

    def _count(self, *texts: str) -> None:
        self.requests += 1
        self.num_bytes += sum(map(len, texts))

    def set(self, key: str, value: str) -> None:
        self._count(key, value)
        self.values[key] = value

    def check(self, keys: list[str]) -> bool:
        self._count(*keys)
        return all(key in self.values for key in keys)

    def add(self, key: str, amount: int) -> int:
        self._count(key)
        self.counters[key] = self.counters.get(key, 0) + amount
        return self.counters[key]

    def multi_get(self, keys: list[str]) -> list[str]:
        self._count(*keys, *(self.values[key] for key in keys))
        return [self.values[key] for key in keys]

    def get(self, key: str) -> str:
        return self.multi_get([key])[0]


def requests_of(
    world_size: int, rank: int, monkeypatch: pytest.MonkeyPatch, *, is_reader: bool
) -> tuple[int, int, int]:
    """Return the requests of a rank at start, while it looks after others in a barrier, and at the end; at most."""
    monkeypatch.setattr(verdict, "_READ_INTERVAL_S", 0.0)
    monkeypatch.setattr(verdict, "_SETTLE_S", 0.0)
    monkeypatch.setattr(watchdog, "_LIVENESS_CHECK_S", 0.0)
    monkeypatch.setattr(watchdog, "_EXIT_S", 1e6)
    store: Any = CountedStore(world_size)
    watch = Watchdog(
        store, rank=rank, world_size=world_size, recorder=FlightRecorder(), timeout_s=1e6, ranks_per_node=8
    )
    watch.start(wait_s=100)
    started = store.requests
    looks = iter([False] * 3 + [True])
    before = store.num_bytes
    watch.wait_until(lambda _: next(looks))
    looked = (store.num_bytes - before) // 3
    if not is_reader:
        store.set("verdict", json.dumps({"text": "rank 3 is lost", "exit_code": 5, "is_reported": False}))
    before = store.num_bytes
    error = watch.explain(CommError("rank 0: #9 failed"))
    read = store.num_bytes - before
    assert isinstance(error, CommError | RemoteRankError)
    watch.leave()
    return started, looked, read


def test_one_rank_alone_reads_the_heartbeats_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    for rank in (0, 1, -1):
        few, many = (requests_of(n, rank % n, monkeypatch, is_reader=False) for n in (64, 512))
        assert many[0] <= few[0] + 3 and many[1] <= few[1] + 2000 and many[2] <= few[2] + 2000, (few, many)
    reads_64, reads_512 = (requests_of(n, 1, monkeypatch, is_reader=True)[2] for n in (64, 512))
    assert 5 * reads_64 < reads_512 < 10 * reads_64, "the one that finds the cause reads all of them, twice"
