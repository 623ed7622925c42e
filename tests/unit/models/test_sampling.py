"""Temperature, top-k, top-p and greedy choice against loops."""

import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from trainer.models.sampling import SamplingOptions

rows = st.lists(st.floats(-8, 8), min_size=1, max_size=12)
# Few distinct values: ties are the rule.
tied_rows = st.lists(st.sampled_from([-2.0, 0.0, 0.5, 1.0]), min_size=1, max_size=12)
temperatures = st.floats(0.05, 4.0)


def test_defaults_change_nothing_but_a_constant():
    logits = torch.randn(3, 7, generator=_seeded(0))
    torch.testing.assert_close(filter_logits(logits).softmax(-1), logits.softmax(-1))


@given(tied_rows)
def test_temperature_zero_takes_the_first_of_the_highest(row: list[float]):
    logits = torch.tensor([row])
    assert sample(logits, temperature=0).tolist() == [row.index(max(row))]
    assert _survivors(filter_logits(logits, 0)) == {row.index(max(row))}


@given(tied_rows, st.integers(1, 15))
def test_top_k_keeps_the_k_highest_and_lower_ids_among_equals(row: list[float], top_k: int):
    assert _survivors(filter_logits(torch.tensor([row]), 1.0, top_k)) == set(_ranked(row)[:top_k])


@given(rows | tied_rows, temperatures, st.none() | st.integers(1, 15), st.floats(0.01, 0.99))
def test_top_p_keeps_the_fewest_tokens_that_reach_p(row, temperature, top_k, top_p):
    expected, masses = _nucleus(row, temperature, top_k, top_p)
    assume(min(abs(mass - top_p) for mass in masses) > 1e-9)  # where rounding can go either way
    logits = torch.tensor([row], dtype=torch.float64)
    assert _survivors(filter_logits(logits, temperature, top_k, top_p)) == expected


@given(rows, temperatures, st.none() | st.integers(1, 15), st.none() | st.floats(0.01, 1))
def test_survivors_keep_their_relative_probabilities(row, temperature, top_k, top_p):
    logits = torch.tensor([row], dtype=torch.float64)
    filtered = filter_logits(logits, temperature, top_k, top_p)
    kept = filtered.isfinite()
    assert kept.any()
    assert filtered.max() == 0
    torch.testing.assert_close(
        filtered[kept].softmax(-1), (logits[kept] / temperature).softmax(-1), rtol=1e-9, atol=1e-12
    )


@given(rows, temperatures, st.integers(1, 15), st.floats(0.01, 1), st.integers(0, 2**31))
def test_only_survivors_are_drawn_and_a_seed_draws_the_same(row, temperature, top_k, top_p, seed):
    logits = torch.tensor([row] * 8)
    options = SamplingOptions(temperature=temperature, top_k=top_k, top_p=top_p)
    drawn = options.sample(logits, generator=_seeded(seed))
    assert drawn.shape == (8,) and drawn.dtype == torch.int64
    assert set(drawn.tolist()) <= _survivors(filter_logits(logits[:1], temperature, top_k, top_p))
    assert drawn.tolist() == options.sample(logits, generator=_seeded(seed)).tolist()


def test_tokens_are_drawn_as_often_as_their_probability_says():
    logits = torch.tensor([[0.0, 1.0, 2.0, -math.inf]]).expand(20000, 4)
    counts = sample(logits, temperature=2.0, generator=_seeded(1)).bincount(minlength=4)
    expected = (logits[0] / 2).softmax(-1)
    # Four standard deviations of a share of 20000 draws are at most 0.0142.
    torch.testing.assert_close(counts / 20000, expected, rtol=0, atol=0.0142)
    assert counts[3] == 0


def test_greedy_draws_nothing_from_the_generator():
    generator = _seeded(3)
    before = generator.get_state()
    sample(torch.randn(2, 5), temperature=0, generator=generator)
    assert torch.equal(generator.get_state(), before)


def test_rows_are_filtered_each_for_itself():
    logits = torch.tensor([[0.0, 5.0, 1.0], [3.0, 0.0, 1.0]])
    assert filter_logits(logits, 1.0, 1).isfinite().tolist() == [[False, True, False], [True, False, False]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_logits_of_the_caller_stay_as_they_are(dtype: torch.dtype):
    logits = torch.tensor([[1.0, 3.0, 2.0]], dtype=dtype)
    filtered = filter_logits(logits, 0.7, 2, 0.5)
    assert logits.tolist() == [[1.0, 3.0, 2.0]]
    assert filtered.dtype == torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize("temperature", [1e-300, 1e-30, 1e-6])
def test_a_very_low_temperature_is_greedy_and_not_nan(temperature: float):
    logits = torch.tensor([[1e4, 3e4, -1e4], [0.0, -1.0, 2.0]])
    assert sample(logits, temperature=temperature, generator=_seeded(0)).tolist() == [1, 2]


def test_top_k_beyond_the_allowed_tokens_keeps_excluded_ones_excluded():
    assert _survivors(filter_logits(torch.tensor([[-math.inf, 1.0, -math.inf]]), 1.0, 3, 0.9)) == {1}


def test_no_rows_give_no_tokens():
    assert sample(torch.empty(0, 5), temperature=0).tolist() == []
    assert sample(torch.empty(0, 5), top_k=2, top_p=0.5).tolist() == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature: -0.1 is not a finite number >= 0"),
        ({"temperature": math.nan}, "temperature: nan"),
        ({"temperature": math.inf}, "temperature: inf"),
        ({"top_k": 0}, "top_k: 0 is less than 1"),
        ({"top_p": 0.0}, r"top_p: 0.0 is not in \(0, 1\]"),
        ({"top_p": 1.5}, "top_p: 1.5"),
        ({"top_p": math.nan}, "top_p: nan"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, float], message: str):
    with pytest.raises(ValueError, match=message):
        SamplingOptions(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_broken_logits_are_refused(value: float):
    with pytest.raises(ValueError, match="a row holds NaN or"):
        sample(torch.tensor([[0.0, 1.0], [0.0, value]]))


def test_a_row_without_any_token_is_refused():
    with pytest.raises(ValueError, match="has no token left"):
        sample(torch.tensor([[-math.inf, -math.inf]]), temperature=0)


@pytest.mark.parametrize("logits", [torch.zeros(3), torch.zeros(1, 0), torch.zeros(1, 2, 3), torch.zeros(1, 3).long()])
def test_logits_of_another_shape_or_type_are_refused(logits: Tensor):
    with pytest.raises(ValueError, match=r"\(B, V\) of a float type is needed"):
        sample(logits)


def filter_logits(
    logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    return SamplingOptions(temperature=temperature, top_k=top_k, top_p=top_p).filter_logits(logits)


def sample(logits: Tensor, *, generator: torch.Generator | None = None, **options: Any) -> Tensor:
    return SamplingOptions(**options).sample(logits, generator=generator)


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _survivors(filtered: Tensor) -> set[int]:
    return set(filtered[0].isfinite().nonzero().flatten().tolist())


def _ranked(row: list[float]) -> list[int]:
    return sorted(range(len(row)), key=lambda token: (-row[token], token))


def _nucleus(row: list[float], temperature: float, top_k: int | None, top_p: float) -> tuple[set[int], list[float]]:
    """Take the most probable tokens until p is reached; also return the cumulative masses."""
    ranked = _ranked(row)[:top_k]
    weights = [math.exp((row[token] - max(row)) / temperature) for token in ranked]
    kept, masses, mass = set(), [], 0.0
    for token, weight in zip(ranked, weights, strict=True):
        if mass < top_p:
            kept.add(token)
        mass += weight / sum(weights)
        masses.append(mass)
    return kept, masses
