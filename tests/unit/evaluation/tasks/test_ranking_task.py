"""Tests for ranking tasks."""

import math
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.evaluation.task_helpers import build, subject
from trainer.evaluation.scoring import Question, score
from trainer.evaluation.tasks.ranking_task import ranking_metrics, ranks_of

CANDIDATES = ["item 12", "item 120", "another", "x", "last one"]


def test_metrics_equal_hand_computed_ones() -> None:
    metrics = ranking_metrics([[1], [3], [2, 4]], [1, 3])
    assert metrics["hit@1"] == pytest.approx(1 / 3) and metrics["hit@3"] == 1.0
    assert metrics["mrr"] == pytest.approx((1 + 1 / 3 + 1 / 2) / 3)
    assert metrics["ndcg@1"] == pytest.approx((1 + 0 + 0) / 3)
    two = 1 / math.log2(3)  # the gain of the second place
    assert metrics["ndcg@3"] == pytest.approx((1 + 1 / math.log2(4) + two / (1 + two)) / 3)
    # Of more right ones than k, no more than k can be among the first k.
    assert ranking_metrics([[1, 2, 3]], [1, 2]).items() >= {"ndcg@1": 1.0, "ndcg@2": 1.0}.items()


def test_relevant_candidates_lose_ties() -> None:
    assert ranks_of([0.0, 0.0, 0.0, 0.0], frozenset({1})) == [4]
    assert ranks_of([0.0, 2.0, 2.0, 1.0], frozenset({1, 3})) == [2, 3]
    metrics = ranking_metrics([ranks_of([-7.0] * 20, frozenset({0}))], [1, 10])
    assert (metrics["hit@1"], metrics["hit@10"], metrics["mrr"]) == (0.0, 0.0, 1 / 20)


def test_nan_is_the_lowest_score() -> None:
    assert ranks_of([math.nan, -5.0, -math.inf], frozenset({0})) == [3]
    assert ranks_of([math.nan, -5.0, math.nan], frozenset({1})) == [1]


@given(st.lists(st.floats(-9, 0), min_size=2, max_size=12, unique=True), st.randoms())
def test_the_rank_does_not_depend_on_the_position_in_the_list(values: list[float], draw: random.Random) -> None:
    place = draw.randrange(len(values))
    (rank,) = ranks_of(values, frozenset({place}))
    assert rank == 1 + sum(value > values[place] for value in values)


@pytest.mark.parametrize("order_by", ["sum", "mean_per_byte"])
def test_candidates_are_ordered_by_how_likely_they_follow(tmp_path: Path, order_by: str) -> None:
    rows = [{"q": "a b c ", "items": CANDIDATES, "next": text} for text in CANDIDATES]
    fields: dict[str, Any] = {"candidates_column": "items", "relevant": "next", "k": [1, 2], "order_by": order_by}
    metrics = build(tmp_path, rows, kind="ranking", **fields).evaluate(subject()).metrics
    prompt = [255, *b"a b c "]
    (scores,) = score(subject(), [Question(prompt=prompt, completions=[[*text.encode(), 255] for text in CANDIDATES])])
    values = [
        one.log_prob / (len(text) if order_by != "sum" else 1) for one, text in zip(scores, CANDIDATES, strict=True)
    ]
    places = [1 + sum(other > value for other in values) for value in values]
    assert metrics["mrr"] == pytest.approx(sum(1 / place for place in places) / 5)
    assert metrics["hit@1"] == 0.2 and metrics["hit@2"] == 0.4 and sorted(places) == [1, 2, 3, 4, 5]


def test_relevant_candidates_are_numbers_texts_or_lists(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"kind": "ranking", "candidates_column": "items", "relevant": "r", "k": [1]}
    named = [{"q": "q", "items": CANDIDATES, "r": right} for right in (2, "x", ["another", 0], [4])]
    numbered = [{"q": "q", "items": CANDIDATES, "r": right} for right in ([2], 3, [0, 2], "last one")]
    assert build(tmp_path, named, **fields).fingerprint == build(tmp_path, numbered, **fields).fingerprint


def test_all_rows_can_share_the_candidates_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "items.txt").write_text("\n".join(CANDIDATES) + "\n\n")
    rows = [{"q": "a b c ", "items": CANDIDATES, "next": "x"}, {"q": "d ", "items": CANDIDATES, "next": 1}]
    fields: dict[str, Any] = {"kind": "ranking", "relevant": "next", "k": [1, 5]}
    own = build(tmp_path, rows, candidates_column="items", **fields)
    shared = build(tmp_path, rows, candidates_file=str(tmp_path / "items.txt"), **fields)
    assert own.evaluate(subject()).metrics == shared.evaluate(subject()).metrics
