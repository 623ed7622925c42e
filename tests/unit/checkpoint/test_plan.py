"""Save plans: every part is written once, the bytes are spread evenly, and missing parts are an error."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.checkpoint.coverage import partition_error
from trainer.checkpoint.manifest import DType
from trainer.checkpoint.plan import Placement, StatePart, plan_save
from trainer.errors import CheckpointError


def _place(
    start: int,
    length: int,
    shape: tuple[int, ...] = (6, 2),
    dtype: DType = "float32",
    is_of_experts: bool = False,
) -> Placement:
    return Placement(start, length, shape, dtype, is_of_experts)


def test_copies_are_written_once_and_spread_over_ranks() -> None:
    copies = {name: _place(0, 6) for name in "abcd"}
    plan = plan_save([copies, copies])
    assert {name: [part.rank for part in parts] for name, parts in plan.parts.items()} == {
        "a": [0],
        "b": [1],
        "c": [0],
        "d": [1],
    }
    assert plan.of_rank(1) == [("b", StatePart(1, 0, 6)), ("d", StatePart(1, 0, 6))]


def test_parts_are_written_by_their_holders() -> None:
    plan = plan_save([{"x": _place(0, 2)}, {"x": _place(2, 4)}, {"x": _place(0, 2)}, {"x": _place(2, 4)}])
    assert plan.parts["x"] == [StatePart(0, 0, 2), StatePart(1, 2, 4)]


def test_rows_apart_are_written_run_by_run_by_whoever_holds_them() -> None:
    first, second = (_place(0, 3)._replace(numbers=numbers) for numbers in ((0, 1, 4), (2, 3, 5)))
    plan = plan_save([{"x": first}, {"x": second}, {"x": first}, {"x": second}])
    parts = [StatePart(0, 0, 2), StatePart(1, 2, 2), StatePart(2, 4, 1), StatePart(3, 5, 1)]
    assert plan.parts["x"] == parts
    with pytest.raises(CheckpointError, match="x: not saved: indices 2 to 3 of 6 are missing"):
        plan_save([{"x": first}, {"x": _place(5, 1)}])


def test_a_rank_without_a_part_writes_none() -> None:
    plan = plan_save([{"x": _place(0, 6)}, {"x": _place(6, 0)}])
    assert plan.parts["x"] == [StatePart(0, 0, 6)]


def test_scalars_and_empty_tensors_are_saved() -> None:
    plan = plan_save([{"n": _place(0, 1, ()), "e": _place(0, 0, (0, 4))}] * 2)
    assert plan.parts == {"n": [StatePart(0, 0, 1)], "e": [StatePart(1, 0, 0)]}


def _with_moments() -> dict[str, Placement]:
    place = _place(0, 6, is_of_experts=True)
    return {name: place for name in ("model.w", "optim.exp_avg.w", "optim.exp_avg_sq.w")}


def test_experts_with_both_moments_are_accepted() -> None:
    assert plan_save([_with_moments()]).parts.keys() == _with_moments().keys()


def test_frozen_experts_have_no_moments() -> None:
    frozen = {"model.w": _with_moments()["model.w"]._replace(is_frozen=True)}
    assert plan_save([frozen]).parts.keys() == frozen.keys()


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ([{"x": _place(0, 2)}, {"x": _place(3, 3)}], "x: not saved: indices 2 to 2 of 6 are missing"),
        ([{"x": _place(0, 2)}, {"x": _place(0, 2)}], "x: not saved: indices 2 to 5 of 6 are missing"),
        ([{"x": _place(0, 4)}, {"x": _place(3, 3)}], "x: not saved: indices 3 to 3 are there twice"),
        ([{"x": _place(0, 7)}], "x: not saved: it reaches to 7 of 6"),
        ([{"x": _place(0, 6)}, {"x": _place(0, 6, dtype="float64")}], "x: ranks disagree"),
        (
            [{n: p for n, p in _with_moments().items() if n != "optim.exp_avg_sq.w"}],
            "optim.exp_avg_sq.w of [6, 2] is missing",
        ),
        (
            [{**_with_moments(), "optim.exp_avg.w": _place(0, 3, (3, 2), is_of_experts=True)}],
            "optim.exp_avg.w of [6, 2] is missing: it is [3, 2]",
        ),
    ],
)
def test_an_incomplete_state_is_not_saved(held: list[dict[str, Placement]], message: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        plan_save(held)
    assert message in str(caught.value)


@given(cuts=st.lists(st.integers(0, 20), max_size=6), total=st.integers(0, 20), data=st.data())
def test_adjacent_parts_cover_a_tensor_and_any_change_is_an_error(
    cuts: list[int], total: int, data: st.DataObject
) -> None:
    edges = sorted({0, total, *(cut for cut in cuts if cut < total)})
    spans = [(a, b - a) for a, b in itertools.pairwise(edges)]
    shuffled = data.draw(st.permutations(spans))
    assert partition_error(shuffled, total) is None
    if spans:
        i = data.draw(st.integers(0, len(spans) - 1))
        start, length = shuffled[i]
        for other in ((start, length - 1), (start, length + 1), (start + 1, length), (start, 0)):
            assert partition_error([*shuffled[:i], other, *shuffled[i + 1 :]], total) is not None
        assert partition_error([*shuffled, shuffled[i]], total) is not None
