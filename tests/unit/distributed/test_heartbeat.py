from dataclasses import replace
from typing import Any

from trainer.distributed.heartbeat import Heartbeat, diagnose_lost_ranks, silent_ranks


def beat(**changes: Any) -> Heartbeat:
    first = Heartbeat(
        number=7,
        state="waits",
        step=3,
        phase="forward",
        where="moe/layer.py:40",
        count=12,
        operations=["#11 all_reduce over world [4]", "#12 all_to_all over ep [2, 3]"],
        barriers=1,
    )
    return replace(first, **changes)


def said(beats: dict[int, Heartbeat], silent: list[int]) -> list[str]:
    return diagnose_lost_ranks(beats, silent, silence_s=3, waited_s=20).splitlines()


def test_a_heartbeat_survives_the_store() -> None:
    assert Heartbeat.from_json(beat(error="e").to_json()) == beat(error="e")


def test_running_ranks_without_a_new_heartbeat_are_silent() -> None:
    before = {0: beat(), 1: beat(), 2: beat(state="left"), 3: beat(state="gave up")}
    after = {**before, 0: beat(number=8)}
    assert silent_ranks(before, after) == [1]


def test_a_lost_rank_is_named_with_the_step_of_the_others() -> None:
    lines = said({0: beat(step=4, count=14), 1: beat(state="works"), 2: beat()}, [1])
    assert lines[0].startswith("rank 1 is lost at step 4 in forward: no heartbeat for 3 s")
    assert lines[0].endswith("the collective had taken 20 s")
    assert lines[2] == (
        "  rank 1 is silent, last seen in step 3, forward at moe/layer.py:40; last collectives: "
        "#11 all_reduce over world [4] #12 all_to_all over ep [2, 3]"
    )


def test_a_living_rank_that_never_came_to_the_collective_is_named() -> None:
    first = said({0: beat(), 1: beat(state="works", count=11, phase="data")}, [])[0]
    assert first.startswith("rank 1 is alive, but never came to collective #12 (step 3, data)")


def test_ranks_in_different_collectives_are_distinguished_from_a_failed_network() -> None:
    other = beat(operations=["#12 all_gather over ep [2]"])
    first = said({0: beat(), 1: beat(operations=["#12 all_to_all over ep [4, 4]"]), 2: other}, [])[0]
    assert first.startswith("rank 2 is in another collective than the others at step 3 in forward")
    assert said({0: beat(), 1: beat()}, [])[0].startswith("no rank is missing at step 3: the network")


def test_a_rank_that_works_while_others_gave_up_is_named() -> None:
    first = said({0: beat(state="gave up"), 1: beat(state="works"), 2: beat(state="gave up")}, [])[0]
    assert first.startswith("rank 1 is alive, but not in the collective: at step 3, forward at moe/layer.py:40")


def test_a_rank_that_ended_early_is_named() -> None:
    assert said({0: beat(), 1: beat(state="left")}, [])[0].startswith(
        "rank 1 is at its end at step 3 while the others continue"
    )


def test_of_many_ranks_the_lost_and_the_slowest_are_listed() -> None:
    beats = {rank: beat(count=rank) for rank in range(100)}
    lines = said(beats, [99])
    assert len(lines) == 1 + 16 + 1
    assert "rank 99 is silent" in lines[-2]
    assert lines[-1] == "  and 84 ranks that came as far or farther"
