"""Tests for the routing optimum: an upper bound that equals exhaustive search."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.evaluation.routing_optimum import Optimality, measure_optimality, within_capacity
from trainer.ops.select import round_mantissa


def test_by_hand() -> None:
    scores = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.6, 0.4], [0.7, 0.3]])
    everyone_s_best = scores > 0.5  # all want expert 0, which takes two
    measured, best = measure_optimality(scores, everyone_s_best, top_k=1, capacity=2)
    assert (measured.wanted, measured.kept, measured.optimum_kept) == (4, 2, 4)
    assert best.chosen.tolist() == [[True, False], [True, False], [False, True], [False, True]]
    assert measured.optimum == pytest.approx(0.9 + 0.8 + 0.4 + 0.3, abs=1e-3)
    assert measured.score == pytest.approx(0.9 + 0.8, abs=1e-3)
    assert measured.gap == pytest.approx(1 - 1.7 / 2.4, abs=1e-3)
    assert (measured.drop_rate, measured.optimum_drop_rate) == (0.5, 0.0)
    # Places at expert 0 are dearer by what the last token that found none would pay, and the last one that did.
    assert 0.4 - 1e-3 < float(best.prices[0] - best.prices[1]) < 0.6 + 1e-3


@given(st.integers(1, 5), st.integers(1, 3), st.integers(1, 3), st.integers(1, 5), st.integers(0, 999))
def test_no_choice_beats_the_optimum(n: int, num_experts: int, top_k: int, capacity: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(n, num_experts, generator=generator)
    chosen = torch.rand(n, num_experts, generator=generator) < 0.7
    measured, best = measure_optimality(scores, chosen, top_k=top_k, capacity=capacity)
    assert measured.gap >= -1e-12
    assert (best.chosen.sum(0) <= capacity).all() and (best.chosen.sum(1) <= top_k).all()
    again, _ = measure_optimality(scores, best.chosen, top_k=top_k, capacity=capacity)
    assert again.gap == 0 and again.drop_rate == again.optimum_drop_rate
    kept = within_capacity(round_mantissa(scores), chosen, top_k=top_k, capacity=capacity)
    assert not (kept & ~chosen).any()
    assert (kept.sum(0) <= capacity).all() and (kept.sum(1) <= top_k).all()


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 2), st.integers(1, 4), st.integers(0, 999))
def test_the_optimum_equals_exhaustive_search(n: int, num_experts: int, top_k: int, capacity: int, seed: int) -> None:
    scores = torch.rand(n, num_experts, generator=torch.Generator().manual_seed(seed))
    best = 0.0
    for cells in itertools.product((0, 1), repeat=n * num_experts):
        x = torch.tensor(cells).view(n, num_experts)
        if (x.sum(1) <= top_k).all() and (x.sum(0) <= capacity).all():
            best = max(best, float((round_mantissa(scores.double()) * x).sum()))
    measured, _ = measure_optimality(scores, torch.zeros_like(scores, dtype=torch.bool), top_k=top_k, capacity=capacity)
    assert measured.optimum == pytest.approx(best, abs=1e-9)


def test_sequences_add_up_and_an_empty_one_adds_nothing() -> None:
    one = Optimality(wanted=4, kept=2, optimum_kept=4, score=1.0, optimum=2.0)
    both = one + Optimality(wanted=2, kept=2, optimum_kept=2, score=1.0, optimum=1.0)
    assert (both.gap, both.drop_rate) == (pytest.approx(1 / 3), pytest.approx(1 / 3))
    empty, best = measure_optimality(torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.bool), top_k=2, capacity=1)
    assert (empty.gap, empty.drop_rate, empty.wanted) == (0, 0, 0) and best.prices.tolist() == [0, 0, 0]
