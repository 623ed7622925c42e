"""One rank finds why the run ends, and all get it; between them the ranks watch everyone."""

import itertools
import threading
from collections import Counter
from contextlib import nullcontext

import pytest
import torch.distributed as dist

from trainer.distributed import verdict
from trainer.distributed.heartbeat import Heartbeat
from trainer.distributed.verdict import Verdict, find_cause, reach_verdict, watched_ranks
from trainer.errors import CommError


def beat(number: int, **values: object) -> Heartbeat:
    default = {
        "state": "waits",
        "step": 4,
        "phase": "forward",
        "where": "",
        "count": 9,
        "operations": [],
        "barriers": 0,
    }
    return Heartbeat(number=number, **(default | values))  # type: ignore[arg-type]


@pytest.mark.parametrize(("world_size", "per_node"), [(2, 2), (6, 2), (6, 1), (7, 3), (8, 8), (8, 4)])
def test_whichever_ranks_are_lost_another_one_watches_one_of_them(world_size: int, per_node: int) -> None:
    watched = [watched_ranks(rank, world_size=world_size, ranks_per_node=per_node) for rank in range(world_size)]
    assert all(rank not in mine for rank, mine in enumerate(watched))
    for lost in itertools.chain.from_iterable(
        map(set, itertools.combinations(range(world_size), n)) for n in range(1, world_size)
    ):
        assert any(lost & set(watched[rank]) for rank in set(range(world_size)) - lost), lost


@pytest.mark.parametrize("world_size", [8, 64, 512, 4096])
def test_a_rank_watches_its_node_and_one_more(world_size: int) -> None:
    on_nodes_of_8 = [watched_ranks(rank, world_size=world_size, ranks_per_node=8) for rank in range(world_size)]
    assert max(map(len, on_nodes_of_8)) == (7 if world_size == 8 else 8)
    on_one_node = [watched_ranks(rank, world_size=world_size, ranks_per_node=world_size) for rank in range(world_size)]
    assert max(map(len, on_one_node)) == min(world_size - 1, 16)
    of_whom = Counter(itertools.chain.from_iterable(on_nodes_of_8))
    assert set(of_whom.values()) == {7 if world_size == 8 else 8}  # nobody's key is read by many


def ask_together(finders: list) -> list[Verdict]:
    store, found = dist.HashStore(), [None] * len(finders)

    def ask(i: int) -> None:
        found[i] = reach_verdict(store, finders[i], deadline=nullcontext)  # type: ignore[call-overload]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(finders))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found  # type: ignore[return-value]


def test_one_rank_looks_for_the_cause_and_all_get_it() -> None:
    asked: list[int] = []

    def find_of(i: int) -> Verdict:
        asked.append(i)
        return Verdict(text=f"rank 3 is lost, says {i}", exit_code=3)

    found = ask_together([lambda i=i: find_of(i) for i in range(6)])
    assert len(asked) == 1 and found == [Verdict(text=f"rank 3 is lost, says {asked[0]}", exit_code=3)] * 6


def test_another_rank_looks_if_the_first_one_ends_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdict, "_TURN_S", 0.3)
    store = dist.HashStore()
    store.add("verdict/turn/0", 1)  # whoever did was killed
    mine = Verdict(text="mine")
    assert reach_verdict(store, lambda: mine, deadline=nullcontext) == mine
    assert reach_verdict(store, lambda: Verdict(text="later"), deadline=nullcontext) == mine


def test_a_rank_without_new_heartbeats_is_lost_unless_an_error_ended_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdict, "_READ_INTERVAL_S", 0.0)
    monkeypatch.setattr(verdict, "_SETTLE_S", 0.0)
    error = CommError("rank 0: #9 failed")
    readings = iter([{0: beat(1), 1: beat(5)}, {0: beat(2), 1: beat(5)}])
    lost = find_cause(lambda: next(readings), error, waited_s=1.0)
    assert lost.text.startswith("rank 1 is lost at step 4 in forward: no heartbeat for ")
    assert lost.text.endswith("noticed by rank 0: #9 failed") and lost.exit_code == CommError.exit_code
    left = {0: beat(1), 1: beat(5), 2: beat(7, state="left", error="shard 7 is damaged", exit_code=3)}
    assert find_cause(lambda: left, error, waited_s=1.0) == Verdict(text="rank 2: shard 7 is damaged", exit_code=3)
