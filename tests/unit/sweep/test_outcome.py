"""Mean, standard error and the one-standard-error rule, against numpy and by hand."""

import numpy as np
import pytest

from tests.sweep_outcomes import outcome
from trainer.runs.significance import error_of_mean
from trainer.sweep.outcome import CandidateOutcome, behind, recommend


def chosen(*outcomes: CandidateOutcome, maximize: bool = False) -> str | None:
    found = recommend(outcomes, maximize=maximize)
    return None if found is None else found.name


def test_the_standard_error_is_that_of_a_mean() -> None:
    values = np.random.default_rng(0).normal(size=7)
    assert error_of_mean(values.tolist()) == pytest.approx(values.std(ddof=1) / 7**0.5, rel=1e-12)
    assert error_of_mean([1.0]) is None


def test_the_cheapest_within_one_standard_error_of_the_best_is_chosen() -> None:
    best = outcome("best", 1.9, 2.0, 2.1, flops=4.0)  # 2.0 +- 0.0577
    near, far = outcome("near", 2.05, 2.05, 2.05, flops=2.0), outcome("far", 2.06, 2.06, 2.06, flops=1.0)
    assert chosen(best, near, far) == "near"
    found = recommend([best, near, far])
    assert found is not None and "best with 2.0000, at 0.50 of its FLOPs" in found.reason
    assert chosen(best, far) == "best", "nothing cheaper is near enough"
    dearer = outcome("dearer", 2.01, 2.01, 2.01, flops=5.0)
    assert chosen(best, dearer) == "best"
    equal = outcome("equal", 2.01, 2.01, 2.01, flops=4.0)
    assert chosen(equal, best) == "best", "of equally cheap ones the best"


def test_a_larger_metric_can_be_better() -> None:
    best, near, worst = outcome("b", 2.9, 3.1, flops=2), outcome("n", 2.85, 3.05), outcome("w", 0.9, 1.1)
    assert chosen(best, near, worst, maximize=True) == "n"
    assert chosen(best, near, worst) == "w"


def test_what_cannot_be_compared_is_not_chosen() -> None:
    assert chosen(outcome("failed", 1.0, trials=2), outcome("whole", 2.0, 2.2)) == "whole"
    assert chosen(outcome("failed", 1.0, trials=2)) is None and chosen() is None
    only = recommend([outcome("failed", 1.0, trials=2), outcome("whole", 2.0, 2.2)])
    assert only is not None and only.reason == "the only one that has trained to the end"
    alone = recommend([outcome("a", 2.0, flops=9.0), outcome("b", 2.0001, flops=1.0)])
    assert alone is not None and alone.name == "a" and "give seeds or folds" in alone.reason


def test_the_difference_from_the_best_leaves_out_what_seeds_share() -> None:
    best, other = outcome("best", 1.0, 2.0, 3.0), outcome("other", 1.1, 2.1, 3.1)
    difference = behind(other, best)
    assert difference is not None
    assert difference[0] == pytest.approx(0.1) and difference[1] == pytest.approx(0, abs=1e-12)
    assert other.error is not None and other.error > 0.5
