"""Assignments against brute force: the optimum and its prices, greedy, balanced, and the transport plan."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trainer.ops.assignment import balanced_assignment, greedy_assignment, solve_linear_program, transport_plan

SIZES = {
    "n": st.integers(1, 4),
    "num_experts": st.integers(1, 3),
    "top_k": st.integers(1, 2),
    "room": st.integers(0, 4),
    "seed": st.integers(0, 9999),
    "ties": st.booleans(),
}


def random_scores(n: int, num_experts: int, seed: int, ties: bool) -> Tensor:
    """Scores from 0 to 1; with ties, multiples of one half including 0."""
    scores = torch.rand(n, num_experts, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (scores * 2).round() / 2 if ties else scores


def fits(chosen: Tensor, top_k: int, room: int) -> bool:
    return bool((chosen.sum(1) <= top_k).all() and (chosen.sum(0) <= room).all())


def best_sum(scores: Tensor, top_k: int, room: int) -> float:
    """Solve the 0-1 programme by trying all assignments."""
    n, num_experts = scores.shape
    tries = (torch.tensor(bits).view(n, num_experts) for bits in itertools.product((0, 1), repeat=n * num_experts))
    return max(float((scores * x).sum()) for x in tries if fits(x, top_k, room))


@settings(max_examples=50)
@given(**SIZES)
def test_the_linear_programme_is_the_optimum_of_the_0_1_programme_and_greedy_at_least_half_of_it(
    n: int, num_experts: int, top_k: int, room: int, seed: int, ties: bool
) -> None:
    scores = random_scores(n, num_experts, seed, ties)
    optimum = best_sum(scores, top_k, room)
    solution = solve_linear_program(scores, top_k=top_k, capacity=room)
    assert fits(solution.chosen, top_k, room)
    assert float(scores[solution.chosen].sum()) == pytest.approx(optimum, abs=1e-9)
    taken = greedy_assignment(scores, top_k=top_k, capacity=room)
    assert fits(taken, top_k, room)
    assert optimum / 2 - 1e-9 <= float(scores[taken].sum()) <= optimum + 1e-9


@settings(max_examples=50)
@given(**{**SIZES, "n": st.integers(1, 12), "num_experts": st.integers(1, 5), "room": st.integers(1, 6)})
def test_at_its_prices_every_token_s_choice_is_its_k_best_and_their_sum_is_the_optimum(
    n: int, num_experts: int, top_k: int, room: int, seed: int, ties: bool
) -> None:
    """At the prices two experts can be equally good for the token in the last slot: compare sums, not choices."""
    scores = random_scores(n, num_experts, seed, ties)
    solution = solve_linear_program(scores, top_k=top_k, capacity=room)
    assert (solution.prices >= 0).all()
    worth = scores - solution.prices
    k_best = worth.clamp(min=0).topk(min(top_k, num_experts), dim=1).values.sum(1)  # (n,)
    chosen = (worth * solution.chosen).sum(1)
    torch.testing.assert_close(chosen, k_best, rtol=0, atol=1e-8)
    by_prices = float(k_best.sum() + room * solution.prices.sum())  # the dual objective
    assert by_prices == pytest.approx(float(scores[solution.chosen].sum()), abs=1e-8)
    fewer, more = (
        float(scores[solve_linear_program(scores, top_k=top_k, capacity=places).chosen].sum())
        for places in (room - 1, room + 1)
    )
    optimum = float(scores[solution.chosen].sum())
    assert more - optimum - 1e-8 <= float(solution.prices.sum()) <= optimum - fewer + 1e-8
    has_room = solution.chosen.sum(0) < room
    assert (solution.prices[has_room] <= 1e-9).all(), "a place at an expert with room left is worth nothing"


def test_a_price_is_between_what_one_more_place_would_bring_and_what_one_fewer_would_cost() -> None:
    scores = torch.tensor([[0.9, 0.1], [0.8, 0.3], [0.7, 0.0]], dtype=torch.float64)
    solution = solve_linear_program(scores, top_k=1, capacity=1)
    assert solution.chosen.tolist() == [[True, False], [False, True], [False, False]]
    # Capacity 2 at expert 0 adds token 2, worth 0.7; capacity 0 removes token 0, worth 0.9.
    assert 0.7 - 1e-9 <= solution.prices[0] <= 0.9 + 1e-9
    # Capacity 2 at expert 1 adds no token; capacity 0 removes token 1, worth 0.3.
    assert -1e-9 <= solution.prices[1] <= 0.3 + 1e-9


def test_no_place_that_could_be_filled_stays_empty() -> None:
    scores = torch.full((4, 2), 0.5)
    assert solve_linear_program(scores, top_k=1, capacity=2).chosen.sum() == 4
    assert greedy_assignment(scores, top_k=1, capacity=2).sum() == 4


def test_greedy_takes_pairs_by_score_then_token_then_expert() -> None:
    scores = torch.tensor([[0.6, 0.6], [0.6, 0.1], [0.9, 0.5]])
    # 2-0 first; then 0-0 is refused (expert 0 is full), 0-1 is taken, and 1-1 is refused (expert 1 is full).
    assert greedy_assignment(scores, top_k=1, capacity=1).tolist() == [[False, True], [False, False], [True, False]]


def test_greedy_can_be_half_as_good_as_the_optimum() -> None:
    scores = torch.tensor([[1.0, 0.999], [0.999, 0.0]], dtype=torch.float64)
    assert float(scores[greedy_assignment(scores, top_k=1, capacity=1)].sum()) == pytest.approx(1.0)
    assert float(scores[solve_linear_program(scores, top_k=1, capacity=1).chosen].sum()) == pytest.approx(1.998)


def test_choices_are_the_same_from_float32_and_carry_no_gradient() -> None:
    scores = torch.rand(6, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    double = scores.detach().double()
    assert torch.equal(
        solve_linear_program(scores, top_k=2, capacity=4).chosen,
        solve_linear_program(double, top_k=2, capacity=4).chosen,
    )
    assert torch.equal(greedy_assignment(scores, top_k=2, capacity=4), greedy_assignment(double, top_k=2, capacity=4))
    assert torch.equal(balanced_assignment(scores), balanced_assignment(double))


def test_a_programme_that_cannot_be_solved_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = SimpleNamespace(status=4, message="numerical trouble")
    monkeypatch.setattr("scipy.optimize.linprog", lambda *_, **__: failed)
    with pytest.raises(ArithmeticError, match="the linear programme of 2 tokens and 3 experts: numerical trouble"):
        solve_linear_program(torch.rand(2, 3), top_k=1, capacity=1)


@settings(max_examples=50)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(0, 9999), st.booleans())
def test_balanced_is_the_best_of_all_even_assignments(n: int, num_experts: int, seed: int, ties: bool) -> None:
    scores = random_scores(n, num_experts, seed, ties) - 0.7  # of both signs
    places = math.ceil(n / num_experts)
    sums = [
        sum(float(scores[token, expert]) for token, expert in enumerate(experts))
        for experts in itertools.product(range(num_experts), repeat=n)
        if max(experts.count(expert) for expert in experts) <= places
    ]
    found = balanced_assignment(scores)
    assert found.shape == (n,) and found.dtype is torch.int64
    assert int(found.bincount(minlength=num_experts).max()) <= places
    assert float(scores.gather(1, found[:, None]).sum()) == pytest.approx(max(sums), abs=1e-9)


def test_no_tokens_are_no_assignments() -> None:
    nothing = torch.zeros(0, 3)
    solution = solve_linear_program(nothing, top_k=2, capacity=1)
    assert solution.chosen.shape == (0, 3) and solution.chosen.dtype is torch.bool
    assert solution.prices.tolist() == [0.0, 0.0, 0.0]
    assert greedy_assignment(nothing, top_k=2, capacity=1).shape == (0, 3)
    assert balanced_assignment(nothing).shape == (0,)
    plan = transport_plan(torch.zeros(2, 0, 3), torch.zeros(2, 0, dtype=torch.bool), iterations=3)
    assert plan.shape == (2, 0, 3)


B, S, E = 3, 8, 4


def rows_with_padding() -> tuple[Tensor, Tensor]:
    """A full row, one with trailing padding, and one of padding only."""
    logits = 2 * torch.randn(B, S, E, generator=torch.Generator().manual_seed(7))
    valid = torch.ones(B, S, dtype=torch.bool)
    valid[1, 5:] = False
    valid[2] = False
    return logits, valid


def test_the_plan_moves_every_token_once_and_onto_all_experts_evenly() -> None:
    logits, valid = rows_with_padding()
    plan = transport_plan(logits, valid, iterations=200)
    assert plan.dtype is torch.float64 and not plan.isnan().any()
    mass = plan.exp()
    torch.testing.assert_close(mass.sum(2), valid.double(), rtol=0, atol=1e-12)
    even = (valid.sum(1).double() / E)[:, None].expand(B, E)
    torch.testing.assert_close(mass.sum(1), even, rtol=0, atol=1e-9)
    assert (plan[~valid] == -torch.inf).all(), "padding has no mass"


def test_the_plan_is_the_logits_but_for_a_factor_for_each_token_and_each_expert() -> None:
    """It is the balanced plan closest to the logits: they differ by row and column scaling only."""
    logits, valid = rows_with_padding()
    scaled = transport_plan(logits, valid, iterations=50)[0] - logits[0].double()  # a_t + b_e
    cross = scaled - scaled[:1] - scaled[:, :1] + scaled[:1, :1]
    torch.testing.assert_close(cross, torch.zeros(S, E, dtype=torch.float64), rtol=0, atol=1e-12)


def test_a_row_s_plan_depends_on_no_other_row_and_on_no_padding() -> None:
    logits, valid = rows_with_padding()
    together = transport_plan(logits, valid, iterations=20)
    for row in range(B):
        alone = transport_plan(logits[row : row + 1], valid[row : row + 1], iterations=20)[0]
        assert torch.equal(alone, together[row])
    without = transport_plan(logits[1:2, :5], valid[1:2, :5], iterations=20)[0]
    torch.testing.assert_close(without, together[1, :5], rtol=0, atol=1e-12)


def test_more_rounds_bring_the_plan_nearer_to_even() -> None:
    logits, valid = rows_with_padding()
    off = [
        float((transport_plan(4 * logits[:1], valid[:1], iterations=rounds).exp().sum(1) - S / E).abs().max())
        for rounds in (1, 5, 50)
    ]
    assert off[0] > off[1] > off[2]
