"""Tests for counts of a layer, against loops."""

from collections import Counter

import numpy as np
import pytest

from trainer.report.measure_layer import (
    coactivation,
    domain_counts,
    flow,
    joint_information_bits,
    load_imbalance,
    saturation,
)
from trainer.report.routed_text import NO_EXPERT, Choices

E, N, K = 5, 200, 3


def choices(seed: int) -> Choices:
    """Return distinct experts of each token, of which some have fewer than k."""
    rng = np.random.default_rng(seed)
    chosen = np.stack([rng.permutation(E)[:K] for _ in range(N)]).astype(np.int16)
    count = rng.integers(0, K + 1, N)
    chosen[np.arange(K)[None] >= count[:, None]] = NO_EXPERT
    return chosen


def sets(chosen: Choices) -> list[set[int]]:
    """Return the experts of each token."""
    return [{int(e) for e in row if e != NO_EXPERT} for row in chosen]


def test_counts_by_domain_together_and_over_layers_are_those_of_a_loop() -> None:
    first, second = choices(0), choices(1)
    domain = np.arange(N) % 3
    by_domain = Counter((g, e) for g, chosen in zip(domain.tolist(), sets(first), strict=True) for e in chosen)
    counted = domain_counts(first, domain, num_domains=3, num_experts=E)
    assert counted.tolist() == [[by_domain[g, e] for e in range(E)] for g in range(3)]
    together = coactivation(first, E)
    assert together is not None
    for e in range(E):
        for f in range(E):
            of_e = [chosen for chosen in sets(first) if e in chosen]
            assert together[e, f] == pytest.approx(sum(f in chosen for chosen in of_e) / len(of_e), abs=1e-12)
    [found] = flow([1, 3], [first, second], E)
    pairs = Counter((e, f) for a, b in zip(sets(first), sets(second), strict=True) for e in a for f in b)
    assert found.counts == tuple(tuple(float(pairs[e, f]) for f in range(E)) for e in range(E))
    assert (found.layer, found.next_layer) == (1, 3)


def test_one_expert_per_token_has_no_companions() -> None:
    assert coactivation(choices(0)[:, :1], E) is None


def test_information_is_all_of_a_permutation_and_none_of_a_product() -> None:
    assert joint_information_bits(np.eye(8, dtype=np.int64)[::-1] * 7) == pytest.approx(3, abs=1e-12)
    assert joint_information_bits(np.outer([1, 2, 3], [4, 1, 6])) == pytest.approx(0, abs=1e-12)
    assert joint_information_bits(np.zeros((2, 2), dtype=np.int64)) == 0


def test_saturation_is_the_overlap_whatever_the_order_of_the_slots() -> None:
    first, last = choices(0), choices(1)
    overlap = sum(len(a & b) for a, b in zip(sets(first), sets(last), strict=True))
    assert saturation(first, last, E) == pytest.approx(overlap / sum(map(len, sets(first))), abs=1e-12)
    assert saturation(first[:, ::-1], first, E) == 1 and saturation(np.full_like(first, NO_EXPERT), last, E) == 0


def test_imbalance_is_the_highest_load_over_the_mean() -> None:
    assert load_imbalance(np.array([0.5, 0.25, 0.25])) == pytest.approx(1.5, abs=1e-12)
    assert load_imbalance(np.zeros(4)) == 0
