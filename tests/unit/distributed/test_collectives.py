"""Collectives, their flight recorder, and the propagation of one rank's error to all."""

import gc
import time

import torch

from tests.ranks import Ranks, mesh_here
from trainer.distributed.collective_errors import raise_together
from trainer.distributed.collectives import Group, RowsExchange
from trainer.distributed.flight_recorder import FlightRecorder
from trainer.errors import DataError, RemoteRankError, TurnoutError


def exchange_uneven() -> tuple[list, list]:
    world = mesh_here().world
    me = world.index
    x = torch.arange(3.0).add(10 * me)[:, None].requires_grad_()
    send, receive = ([1, 2], [1, 3]) if me == 0 else ([3, 0], [2, 0])
    y = world.all_to_all(x, send, receive)
    (y * (me + 1)).sum().backward()
    assert x.grad is not None
    return y.flatten().tolist(), x.grad.flatten().tolist()


def test_all_to_all_orders_rows_by_sender_and_returns_their_gradient(ranks: Ranks) -> None:
    (y0, grad0), (y1, grad1) = ranks.run(2, exchange_uneven)
    assert (y0, y1) == ([0.0, 10.0, 11.0, 12.0], [1.0, 2.0])
    assert (grad0, grad1) == ([1.0, 2.0, 2.0], [1.0, 1.0, 1.0])


def compare_values() -> list:
    world = mesh_here().world
    me = world.index
    ends = torch.tensor([5, -(2**63), me, 2**63 - 1 - (me == 1), -(me == 2)])
    everywhere = world.agrees({"a": [1, 2.5]}), world.agrees({"a": me == 1})
    return [world.differs(ends).tolist(), everywhere, world.any(me == 1), world.any(False), world.gather_objects([me])]


def test_ranks_see_alike_where_they_differ(ranks: Ranks) -> None:
    *answers, gathered = zip(*ranks.run(3, compare_values), strict=True)
    expected = [[False, False, True, True, True], (True, False), True, False]
    assert [list(answer) for answer in answers] == [[value] * 3 for value in expected]
    assert gathered == ([[0], [1], [2]], None, None)


def count_exchanges() -> int:
    world = mesh_here().world
    gc.collect()
    gc.disable()
    for _ in range(5):
        x = torch.ones(2, 3, requires_grad=True)
        (world.all_to_all(x, [1, 1], [1, 1]) * 2).sum().backward()
    end = time.monotonic() + 10  # the process group's threads release it a moment later
    while (left := sum(type(thing) is RowsExchange for thing in gc.get_objects())) and time.monotonic() < end:
        time.sleep(0.01)
    return left


def test_an_all_to_all_is_freed_with_its_result(ranks: Ranks) -> None:
    """Its rows are large and must not wait for the garbage collector."""
    assert ranks.run(2, count_exchanges) == [0, 0]


def test_a_group_of_one_communicates_nothing() -> None:
    group = Group.of_one()
    x = torch.arange(4.0)
    assert group.all_reduce_(x) is x and group.all_to_all(x, [4], [4]) is x and group.broadcast_(x) is x
    assert group.all_gather(x).shape == (1, 4) and group.all_gather_objects("a") == ["a"]
    assert group.recorder.count == 0


def note_four() -> list[str]:
    recorder = FlightRecorder()
    mesh = mesh_here(ep_size=2, recorder=recorder)
    mesh.world.all_reduce_(torch.zeros(5))
    mesh.ep.all_gather(torch.zeros(2))
    mesh.edp.broadcast_(torch.zeros(1))
    for _ in range(100):
        mesh.world.all_reduce_(torch.zeros(1))
    first, last = recorder.operations[0], recorder.operations[-1]
    return [str(recorder.count), str(len(recorder.operations)), str(first), str(last)]


def test_the_flight_recorder_keeps_the_last_operations_with_number_group_and_sizes(ranks: Ranks) -> None:
    for lines in ranks.run(4, note_four):
        assert lines == ["103", "32", "#72 all_reduce over world [1]", "#103 all_reduce over world [1]"]


def fail_on(failing: list[int], kind: type[Exception]) -> tuple[str, str, int | None, bool | None]:
    world = mesh_here().world
    try:
        with raise_together(world):
            if world.index in failing:
                raise kind(f"cannot read x, says {world.index}")
    except Exception as error:
        is_turnout = isinstance(error, TurnoutError)
        code, shown = (error.exit_code, error.is_rank_specific) if is_turnout else (None, None)
        return type(error).__name__, str(error), code, shown
    return "", "", None, None


def test_one_rank_s_error_ends_all_and_is_shown_by_that_rank(ranks: Ranks) -> None:
    message = "rank 1: cannot read x, says 1"
    expected = [
        (RemoteRankError.__name__, message, DataError.exit_code, False),
        (DataError.__name__, message, DataError.exit_code, True),
        (RemoteRankError.__name__, message, DataError.exit_code, False),
    ]
    assert ranks.run(3, fail_on, [1, 2], DataError) == expected
    assert ranks.run(3, fail_on, [], DataError) == [("", "", None, None)] * 3


def test_an_unexpected_error_keeps_its_type_on_its_rank(ranks: Ranks) -> None:
    (kind, text, *_), (other, other_text, code, _) = ranks.run(2, fail_on, [0], ZeroDivisionError)
    assert (kind, text) == ("ZeroDivisionError", "cannot read x, says 0")
    assert (other, code) == ("RemoteRankError", 1)
    assert other_text == "rank 0: ZeroDivisionError: cannot read x, says 0"


def test_out_of_memory_on_one_rank_ends_the_others_with_its_code(ranks: Ranks) -> None:
    (kind, *_), (other, _, code, _) = ranks.run(2, fail_on, [0], MemoryError)
    assert (kind, other, code) == ("MemoryError", "RemoteRankError", 7)
