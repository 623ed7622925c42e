"""Heartbeats of a node: one of its ranks publishes those of all, whoever of them is lost."""

import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from trainer.distributed.heartbeat import Heartbeat
from trainer.distributed.heartbeat_board import HeartbeatBoard
from trainer.distributed.heartbeat_thread import HeartbeatThread, NodeRanks, read_heartbeats

WORLD, PER_NODE = 7, 4
"""Nodes of four and three ranks."""
LIMIT_S = 60.0


class CountingStore:
    """Store of this process that counts what each key is set to."""

    def __init__(self) -> None:
        self.store, self.sets = dist.HashStore(), Counter[str]()

    def set(self, key: str, value: str) -> None:
        self.sets[key] += 1
        self.store.set(key, value)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)


class Rank:
    """A rank with a heartbeat; it can be frozen."""

    def __init__(self, store: Any, rank: int) -> None:
        self.goes_on, self.steps = threading.Event(), 0
        self.goes_on.set()
        node = NodeRanks.of(rank, world_size=WORLD, ranks_per_node=PER_NODE)
        self.thread = HeartbeatThread(store, rank=rank, node=node, beat=self.beat)

    def beat(self, number: int) -> Heartbeat:
        self.goes_on.wait()
        return Heartbeat(
            number=number, state="works", step=self.steps, phase="", where="", count=0, operations=[], barriers=0
        )


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def store() -> Any:
    return CountingStore()


@pytest.fixture
def ranks(folder: Path, store: Any) -> Iterator[list[Rank]]:
    made = [Rank(store, rank) for rank in range(WORLD)]
    yield made
    for rank in made:
        rank.goes_on.set()
        rank.thread.stop(wait_s=LIMIT_S)
    assert not list(folder.iterdir()), "the boards have lost their names"


def start(store: Any, ranks: list[Rank]) -> None:
    for rank in ranks:
        rank.thread.start()
    wait_until(lambda: HeartbeatThread.num_started(store) == WORLD)


def wait_until(done: Callable[[], bool]) -> None:
    end = time.monotonic() + LIMIT_S
    while not done():
        assert time.monotonic() < end
        time.sleep(0.05)


def numbers(store: Any) -> dict[int, int]:
    beats = read_heartbeats(store, range(WORLD), world_size=WORLD, ranks_per_node=PER_NODE)
    return {rank: beat.number for rank, beat in beats.items()}


def test_what_the_store_gets_grows_with_the_nodes(store: Any, ranks: list[Rank], folder: Path) -> None:
    start(store, ranks)
    wait_until(lambda: not list(folder.iterdir()))  # every rank writes to its board
    before, sets = numbers(store), store.sets.copy()
    wait_until(lambda: all(number > before[rank] + 2 for rank, number in numbers(store).items()))
    assert set(store.sets - sets) == {"beats/0", "beats/4"}


def test_a_rank_with_news_is_heard_at_once_and_a_last_word_stays(store: Any, ranks: list[Rank]) -> None:
    start(store, ranks)
    wait_until(lambda: all(number > 1 for number in numbers(store).values()))
    ranks[5].steps = 8
    ranks[5].thread.stop(wait_s=LIMIT_S)
    beats = read_heartbeats(store, range(WORLD), world_size=WORLD, ranks_per_node=PER_NODE)
    assert {rank: beat.step for rank, beat in beats.items() if beat.step} == {5: 8}


@pytest.mark.parametrize("frozen", [{0}, {2}, {0, 1, 2}, {4, 5, 6}])
def test_frozen_ranks_are_silent_and_no_others(store: Any, ranks: list[Rank], frozen: set[int]) -> None:
    start(store, ranks)
    for rank in frozen:
        ranks[rank].goes_on.clear()
    time.sleep(2.0)  # what they had begun is published
    before = numbers(store)
    wait_until(lambda: all(numbers(store)[rank] > before[rank] for rank in set(range(WORLD)) - frozen))
    assert {rank for rank, number in numbers(store).items() if number == before[rank]} == frozen


def test_ranks_without_a_common_folder_publish_their_own(
    folder: Path, store: Any, ranks: list[Rank], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(folder / "missing"))
    start(store, ranks)
    before = numbers(store)
    wait_until(lambda: all(number > before[rank] for rank, number in numbers(store).items()))
    assert {"beats/0": 1, "beats/4": 1}.items() <= store.sets.items(), "empty ones"


def test_a_heartbeat_that_is_just_being_written_or_too_long_leaves_the_one_before(folder: Path) -> None:
    first = HeartbeatBoard.create(num_ranks=2, index=0)
    assert first.path is not None
    second = HeartbeatBoard.open(first.path, num_ranks=2, index=1)
    assert first.read() == {} and list(folder.iterdir()), "not all have opened it"
    second.write('{"number": 1}')
    first.write('{"number": 7}')
    assert first.read() == second.read() == {0: {"number": 7}, 1: {"number": 1}}
    for text in ('{"number": 2', '{"number": 2, "error": "' + 4096 * "x" + '"}'):
        second.write(text)
        assert first.read()[1] == {"number": 1}
    assert not list(folder.iterdir())
    assert first.is_due(0.5)
    second.mark_published()
    assert not first.is_due(100.0)
    first.close()
    second.close()
