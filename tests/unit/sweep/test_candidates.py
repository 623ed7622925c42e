"""Candidates: combinations, draws and points, each with a name of its own."""

import math

import pytest

from trainer.errors import ConfigError
from trainer.sweep.candidates import candidates
from trainer.sweep.sweep_config import SweepConfig


def sweep(**keys: object) -> SweepConfig:
    return SweepConfig.model_validate({"name": "s", "config": "x.yaml", **keys})


def test_a_grid_has_every_combination_once_and_then_the_points() -> None:
    over = {"model.moe.router.top_k": [1, 2], "model.d_ff": [8, 16, 24]}
    found = candidates(sweep(over=over, points=[{"name": "dense", "model.moe": None}]))
    values = [tuple(one.changes.values()) for one in found]
    assert values == [(k, width) for k in (1, 2) for width in (8, 16, 24)] + [(None,)]
    assert [one.name for one in found][::6] == ["top_k-1_d_ff-8", "dense"]
    assert found[5].places == {"model.moe.router.top_k": ("over", "model.moe.router.top_k", 1),
                               "model.d_ff": ("over", "model.d_ff", 2)}  # fmt: skip


def test_values_whose_names_would_be_alike_have_other_names_and_like_keys_their_sections() -> None:
    over = {"data.cache_dir": ["a/b", "a b"], "a.x": [1], "b.x": [2]}
    assert [one.name for one in candidates(sweep(over=over))] == [
        "cache_dir-a-b_a-x-1_b-x-2",
        "cache_dir-a-b_a-x-1_b-x-2-2",
    ]
    with pytest.raises(ConfigError, match=r"two candidates are both \{a: 1\}; list each once"):
        candidates(sweep(over={"a": [1]}, points=[{"name": "again", "a": 1}]))
    with pytest.raises(ConfigError, match="two candidates are called one"):
        candidates(sweep(points=[{"name": "one", "seed": 1}, {"name": "one", "seed": 2}]))
    with pytest.raises(ConfigError, match=r"points.0.name: .*/.* is no name of a folder"):
        candidates(sweep(points=[{"name": "../up", "seed": 1}]))


def test_draws_stay_in_their_ranges_fill_them_and_more_draws_begin_with_the_same() -> None:
    over = {"a": {"log_uniform": [1e-4, 1e-2]}, "b": {"whole": [1, 3]}, "c": ["x", "y"], "d": {"uniform": [-1, 1]}}
    method = {"kind": "random", "draws": 400, "draw_seed": 3}
    found = [dict(one.changes) for one in candidates(sweep(over=over, method=method))]
    few = candidates(sweep(over=over, method={**method, "draws": 5}))
    assert [dict(one.changes) for one in few] == found[:5]
    assert {one["b"] for one in found} == {1, 2, 3} and {one["c"] for one in found} == {"x", "y"}
    assert all(1e-4 <= one["a"] <= 1e-2 and -1 <= one["d"] <= 1 for one in found)
    below = sum(one["a"] < 1e-3 for one in found)
    assert abs(below - 200) < 5 * math.sqrt(400 / 4), "half of a log-uniform range lies below its geometric mean"
    others = candidates(sweep(over=over, method={**method, "draw_seed": 4}))
    assert [dict(one.changes) for one in others] != found


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({}, "there is no candidate"),
        ({"over": {"a": []}}, "a has no values"),
        ({"over": {"a": {"uniform": [0, 1]}}}, "a is a range, which has no combinations"),
        ({"over": {"a": {"uniform": [1, 1]}}, "method": {"kind": "random", "draws": 2}}, "is empty"),
        ({"over": {"a": {"log_uniform": [0, 1]}}, "method": {"kind": "random", "draws": 2}}, "has no logarithm"),
        ({"over": {"a": {}}, "method": {"kind": "random", "draws": 2}}, "has 0 ranges"),
        ({"over": {"a": [1]}, "method": {"kind": "list"}}, "list has no combinations"),
        ({"points": [{"a": 1}], "method": {"kind": "random", "draws": 2}}, "nothing to draw 2 candidates from"),
        ({"over": {"seed": [1]}, "seeds": [1]}, "seed cannot be set here"),
        ({"over": {"data.fold": [None]}, "folds": 2}, "data.fold cannot be set here"),
        ({"over": {"a": [1]}, "common": {"a": 2}}, "a is in `over` too"),
        ({"points": [{"name": "nothing"}]}, "sets no key"),
        ({"points": [{"runs_dir": "x"}]}, "runs_dir cannot be set here"),
        ({"over": {"a": [1]}, "seeds": [1, 1]}, "1 is there twice"),
    ],
)
def test_a_sweep_without_sense_is_refused(keys: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sweep(**keys)
