"""Alarms about the load of experts, on made-up counts."""

import pytest

from trainer.metrics.alarms.balance_rules import DeadExperts, ImbalanceGrowth, collapsed_layers, imbalance_limit
from trainer.metrics.alarms.config import AlarmsConfig
from trainer.metrics.alarms.observation import Observation
from trainer.metrics.alarms.symptom import Symptom, TrainingFacts

CONFIG = AlarmsConfig()
FACTS = TrainingFacts(num_experts=4, learns_routing=True, layers=(3,))


def seen(counts: list[float], *, step: int = 10, k: float = 2.0) -> Observation:
    return Observation(step=step, loss=1.0, lr=1e-3, grad_norm=1.0, experts_per_token=k, counts=[counts])


def test_a_layer_has_collapsed_when_it_uses_little_more_than_k_experts_however_many_there_are() -> None:
    for k, num_experts in ((1, 4), (2, 8), (8, 64)):
        facts = TrainingFacts(num_experts=num_experts, learns_routing=True, layers=(3,))
        worst = [1000.0] * k + [0.0] * (num_experts - k)
        (found,) = collapsed_layers(seen(worst, k=k), CONFIG, facts)
        assert found.value == pytest.approx(0, abs=1e-12) and found.layer == 3 and found.severity > 100
        assert not list(collapsed_layers(seen([1000.0] * num_experts, k=k), CONFIG, facts))
    assert not list(collapsed_layers(seen([1000.0, 0, 0, 0], k=4), CONFIG, FACTS)), "all experts are visited by rule"
    fixed = TrainingFacts(num_experts=4, learns_routing=False, layers=(3,))
    assert not list(collapsed_layers(seen([1000.0, 0, 0, 0], k=1), CONFIG, fixed)), "a hash learns no balance"


def test_an_imbalance_counts_from_twice_the_mean_or_half_way_to_the_most() -> None:
    assert imbalance_limit(CONFIG, seen([1.0] * 64, k=8), 0) == 2.0
    assert imbalance_limit(CONFIG, seen([1.0] * 4, k=2), 0) == 1.5
    assert imbalance_limit(CONFIG, seen([1.0] * 4, k=4), 0) == float("inf")


def dead_at(rule: DeadExperts, steps: range, counts: list[float]) -> list[Symptom]:
    return [found for step in steps for found in rule.find(seen(counts, step=step))]


def test_an_expert_is_dead_after_the_patience_and_alive_with_its_first_tokens() -> None:
    rule = DeadExperts(CONFIG, FACTS)
    assert not dead_at(rule, range(10, 60, 10), [100.0, 100.0, 0.0, 100.0])
    (found,) = rule.find(seen([100.0, 100.0, 0.0, 100.0], step=60))
    assert (found.experts, found.value, found.since, found.is_lasting) == ([2], 1, 10, True)
    assert not list(rule.find(seen([100.0, 100.0, 30.0, 100.0], step=70)))
    assert not list(rule.find(seen([100.0, 100.0, 0.0, 100.0], step=80))), "it begins anew"


def test_few_tokens_say_nothing_about_an_expert() -> None:
    assert not dead_at(DeadExperts(CONFIG, FACTS), range(10, 300, 10), [10.0, 10.0, 0.0, 10.0])


def test_a_share_of_one_percent_is_dead_and_a_larger_one_is_not() -> None:
    assert dead_at(DeadExperts(CONFIG, FACTS), range(10, 80, 10), [1000.0, 1000.0, 5.0, 1000.0])
    assert not dead_at(DeadExperts(CONFIG, FACTS), range(10, 80, 10), [1000.0, 1000.0, 10.0, 1000.0])


@pytest.mark.parametrize("every", [1, 10])
def test_an_imbalance_that_rises_from_third_to_third_is_found_and_a_constant_or_small_one_is_not(every: int) -> None:
    def found(first: float, last: float) -> list[Symptom]:
        rule, everything = ImbalanceGrowth(CONFIG, FACTS), []
        for step in sorted({1, *range(every, 61, every)}):
            busiest = first + (last - first) * step / 60
            rest = (4 - busiest) / 3
            everything += rule.find(seen([100 * busiest, 100 * rest, 100 * rest, 100 * rest], step=step, k=1))
        return everything

    grown = found(1.1, 3.0)
    assert [one.alarm for one in grown] == ["imbalance_growth"] * len(grown) and grown
    assert not found(3.0, 3.0) and not found(3.0, 1.1), "bad, but not growing"
    assert not found(1.0, 1.6), "growing, but small"
