"""Mutual information of expert and domain."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.metrics.specialisation import domain_entropy_bits, mutual_information_bits, specialisation_metrics


def test_mutual_information_equals_the_hand_computed_value() -> None:
    # p = [[3, 1], [1, 3]] / 8: 2 * 3/8 * log2(3/2) + 2 * 1/8 * log2(1/2)
    assert mutual_information_bits([[3, 1], [1, 3]]) == pytest.approx(0.75 * math.log2(1.5) - 0.25)


def test_it_is_the_entropy_of_the_domains_when_each_has_an_expert_of_its_own() -> None:
    assert mutual_information_bits([[4, 0, 0], [0, 4, 0], [0, 0, 4]]) == pytest.approx(math.log2(3))


def test_it_is_zero_when_experts_ignore_the_domain() -> None:
    assert mutual_information_bits([[10, 30, 0], [20, 60, 0]]) == pytest.approx(0, abs=1e-12)
    assert mutual_information_bits([[0, 0], [0, 0]]) == 0
    assert mutual_information_bits([[5, 7]]) == pytest.approx(0, abs=1e-12)


def test_domains_have_equal_weight_and_empty_ones_are_left_out() -> None:
    counts = [[30, 10, 5], [1, 20, 3], [7, 7, 7]]
    more = [[30_000, 10_000, 5_000], [1, 20, 3], [70, 70, 70], [0, 0, 0]]
    assert mutual_information_bits(more) == pytest.approx(mutual_information_bits(counts))
    assert domain_entropy_bits(more) == pytest.approx(math.log2(3))


@given(st.lists(st.lists(st.integers(0, 99), min_size=3, max_size=3), min_size=2, max_size=4))
def test_it_equals_a_plain_loop(counts: list[list[int]]) -> None:
    rows = [[count / sum(row) for count in row] for row in counts if sum(row)]
    expected = 0.0
    for row in rows:
        for expert, share in enumerate(row):
            if share:
                expected += share / len(rows) * math.log2(share * len(rows) / sum(other[expert] for other in rows))
    assert mutual_information_bits(counts) == pytest.approx(expected, abs=1e-9)


def test_its_sampling_bias_is_as_documented() -> None:
    draw, domains, experts, assignments = np.random.default_rng(0), 3, 8, 2000
    found = [
        mutual_information_bits(draw.multinomial(assignments, [1 / experts] * experts, size=domains).tolist())
        for _ in range(300)
    ]
    said = (domains - 1) * (experts - 1) / (2 * math.log(2) * domains * assignments)
    assert float(np.mean(found)) == pytest.approx(said, rel=0.1)


def test_counts_of_another_shape_are_rejected() -> None:
    with pytest.raises(ValueError, match=r"shape \(2,\)"):
        mutual_information_bits([1, 2])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="numbers >= 0"):
        mutual_information_bits([[1, -2]])


def test_the_record_is_the_mean_over_layers_and_its_share_of_the_entropy() -> None:
    metrics = specialisation_metrics([[[5, 0], [0, 5]], [[5, 5], [50, 50]]])
    assert metrics == {"eval/expert_domain_mi": pytest.approx(0.5), "eval/expert_domain_mi_share": pytest.approx(0.5)}
    four = specialisation_metrics([np.diag([1, 2, 3, 4]).tolist()])
    assert four == {"eval/expert_domain_mi": pytest.approx(2.0), "eval/expert_domain_mi_share": pytest.approx(1.0)}


def test_a_dense_model_or_a_single_domain_has_no_record() -> None:
    assert specialisation_metrics([]) == specialisation_metrics([[[3, 4]]]) == {}
