"""Selection among scores that are equal, or equal up to rounding error."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.ops.select import best_of_rows, round_logits, round_mantissa, stable_top_k


def _one_by_one(scores: torch.Tensor, k: int) -> list[list[int]]:
    """Sort the columns of each row by score and then by number."""
    return [sorted(range(len(row)), key=lambda e, row=row: (-row[e], e))[:k] for row in scores.tolist()]


@settings(max_examples=200)
@given(st.integers(1, 6), st.integers(1, 40), st.integers(0, 10_000), st.sampled_from([1, 2, 5, 1000]), st.data())
def test_equals_a_sort_by_score_and_number(
    tokens: int, experts: int, seed: int, levels: int, data: st.DataObject
) -> None:
    scores = torch.randint(0, levels, (tokens, experts), generator=torch.Generator().manual_seed(seed)).float() / levels
    k = data.draw(st.integers(1, experts))
    assert stable_top_k(scores, k).tolist() == _one_by_one(scores, k)


@pytest.mark.parametrize("experts", [1, 2, 8, 33, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_excluded_scores_come_last_in_order_and_none_is_taken_twice(experts: int, dtype: torch.dtype) -> None:
    scores = torch.randn(50, experts, dtype=dtype, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    scores[torch.rand(50, experts, generator=torch.Generator().manual_seed(1)) < 0.8] = -math.inf
    scores[7] = -math.inf
    scores[8] = -0.0
    scores[8, ::2] = 0.0
    scores[9, experts // 2] = math.nan
    for k in range(1, experts + 1):
        expected = scores.sort(dim=-1, descending=True, stable=True).indices[:, :k]
        assert torch.equal(stable_top_k(scores, k), expected), "both ways agree"


def test_equal_scores_go_to_the_lower_expert() -> None:
    assert stable_top_k(torch.ones(3, 64), 4).tolist() == [[0, 1, 2, 3]] * 3


LAST_BITS = torch.linspace(-1, 1, 9)[:, None]


@pytest.mark.parametrize("exponent", [0, -3, -40])
@pytest.mark.parametrize("step", [0, 7, 901, 2046])
def test_scores_that_only_rounding_tells_apart_are_equal_on_the_border_of_two_steps_too(
    step: int, exponent: int
) -> None:
    scores = (2048.5 + step) / 4096 * 2.0**exponent * (1 + 2e-7 * LAST_BITS)  # (9, 1)
    assert len((torch.frexp(scores).mantissa * 4096).round().unique()) == 2, "12 bits alone tell them apart"
    assert len(round_mantissa(scores).unique()) == 1


@pytest.mark.parametrize("step", [-9000, -1, 0, 901])
def test_logits_that_only_rounding_tells_apart_are_equal_on_the_border_of_two_steps_too(step: int) -> None:
    logits = (step + 0.5) / 4096 + 1e-6 * LAST_BITS
    assert len((logits * 4096).round().unique()) == 2, "multiples of 1 / 4096 alone tell them apart"
    assert len(round_logits(logits).unique()) == 1


@pytest.mark.parametrize("num_experts", range(2, 65))
def test_an_even_plan_is_even_for_any_number_of_experts(num_experts: int) -> None:
    """log(1 / 16) is 6e-6 from a boundary between two steps, less than the error of float32 logits."""
    noise = torch.rand(num_experts, 5, generator=torch.Generator().manual_seed(num_experts)) * 4e-5 - 2e-5
    assert (round_logits(noise.double() - math.log(num_experts)).diff(dim=0) == 0).all()


def test_scores_that_differ_keep_their_order_and_their_size() -> None:
    scores = torch.rand(50, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rounded = round_mantissa(scores)
    assert ((rounded - scores).abs() <= scores / 2048).all()
    pairs = scores[:, None] > scores * (1 + 1 / 1024)  # (50, 50, 3)
    assert (rounded[:, None] > rounded)[pairs].all()
    logits = 5 * scores - 2
    assert ((round_logits(logits) - logits).abs() <= 1 / 4096).all()
    assert (round_logits(logits)[:, None] > round_logits(logits))[logits[:, None] > logits + 1 / 2048].all()


def test_columns_and_groups_are_compared_by_themselves() -> None:
    scores = torch.tensor([[0.3, 0.30001], [0.30002, 0.5], [0.7, 0.49999]])
    together = round_mantissa(scores)
    for column in (0, 1):
        assert torch.equal(round_mantissa(scores[:, column]), together[:, column])
    assert torch.equal(round_mantissa(scores.t(), dim=1).t(), together)
    assert torch.equal(round_logits(scores.expand(2, 3, 2), dim=1)[1], round_logits(scores))
    assert together[0, 0] == together[1, 0] and together[1, 1] == together[2, 1]
    group = torch.tensor([0, 1] * 3)
    assert torch.equal(round_mantissa(scores.flatten(), group=group), together.flatten())
    shuffled = torch.tensor([4, 1, 3, 0, 5, 2])
    assert torch.equal(round_mantissa(scores.flatten()[shuffled], group=group[shuffled]), together.flatten()[shuffled])


def test_few_scores_and_strange_ones() -> None:
    assert round_mantissa(torch.zeros(0, 3)).shape == (0, 3) and round_mantissa(
        torch.zeros(0), group=torch.zeros(0).long()
    ).shape == (0,)
    assert round_mantissa(torch.tensor(0.3)) == round_mantissa(torch.tensor([0.3]))[0]
    assert round_mantissa(torch.tensor([0.0, 1.0, 0.0])).tolist() == [0.0, 1.0, 0.0]
    below_normal = torch.tensor([1.646525696e-42, 1.647926994e-42])  # they differ in the last bit only
    assert below_normal[0] != below_normal[1] and len(round_mantissa(below_normal).unique()) == 1
    assert round_logits(torch.tensor([[-torch.inf], [1.0]])).flatten().tolist() == [-torch.inf, 1.0]
    assert not round_mantissa(torch.tensor([torch.nan, torch.inf, 1.0])).isfinite().all()


@settings(max_examples=200)
@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 4), st.integers(0, 10_000), st.sampled_from([1, 3, 1000]))
def test_best_of_rows_equals_one_row_and_column_at_a_time(
    rows: int, length: int, columns: int, seed: int, levels: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, levels, (rows, length, columns), generator=generator).float()
    scores[torch.rand(scores.shape, generator=generator) < 0.1] = -torch.inf
    valid = torch.rand(rows, length, generator=generator) < 0.7
    count = torch.minimum(torch.randint(0, length + 1, (rows,), generator=generator), valid.sum(1))
    expected = torch.zeros_like(scores, dtype=torch.bool)
    for row in range(rows):
        here = scores[row, valid[row]].t()  # (columns, n)
        chosen = torch.zeros_like(here, dtype=torch.bool)
        expected[row, valid[row]] = chosen.scatter(-1, stable_top_k(here, int(count[row])), True).t()
    assert torch.equal(best_of_rows(scores, valid, count), expected)
    assert torch.equal(best_of_rows(scores[..., 0], valid, count), expected[..., 0])
