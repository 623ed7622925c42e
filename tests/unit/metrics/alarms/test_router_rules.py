"""Alarms about routers, on made-up numbers."""

from dataclasses import replace
from math import log
from typing import Any

from trainer.metrics.alarms.config import AlarmsConfig
from trainer.metrics.alarms.observation import Observation
from trainer.metrics.alarms.router_rules import router_symptoms
from trainer.metrics.alarms.symptom import Symptom, TrainingFacts

CONFIG = AlarmsConfig()
FACTS = TrainingFacts(num_experts=4, learns_routing=True, layers=(0, 2), bias_update_rate=1e-3)
WELL = Observation(
    step=10,
    loss=1.0,
    lr=1e-3,
    grad_norm=1.0,
    experts_per_token=1.0,
    counts=[[250.0] * 4] * 2,
    entropy=[1.0, 1.0],
    token_information=[0.1, 0.1],
    prob_span=[0.3, 0.3],
    router_grad_norm=[0.1, 0.1],
    bias_span=[0.01, 0.01],
    bias_change=[1e-3, 1e-3],
)
UNEVEN: Any = [[250.0] * 4, [900.0, 50.0, 50.0, 0.0]]


def changed(**values: Any) -> Observation:
    return replace(WELL, **values)


def found(observation: Observation, facts: TrainingFacts = FACTS, config: AlarmsConfig = CONFIG) -> list[Symptom]:
    return list(router_symptoms(observation, config, facts))


def test_each_number_of_a_layer_rings_its_own_alarm_and_only_beyond_its_threshold() -> None:
    assert not found(WELL)
    for key, alarm, threshold in (
        ("entropy", "entropy_zero", 0.01 * log(4)),
        ("token_information", "alike_tokens", 1e-3 * log(4)),
        ("router_grad_norm", "router_gradient", 1e-6),
    ):
        (one,) = found(changed(**{key: [1.0, 0.9 * threshold]}))
        assert (one.alarm, one.layer) == (alarm, 2)
        assert not found(changed(**{key: [1.0, 1.1 * threshold]}))
        assert not found(changed(**{key: [1.0, None]})), "unknown"
        assert not found(changed(**{key: ()})), "a run of an older version"


def test_no_gradient_of_a_frozen_router_is_no_illness() -> None:
    assert not found(replace(WELL, router_grad_norm=[0.0, 0.0]), replace(FACTS, is_router_frozen=True))


def test_routers_that_do_not_learn_ring_nothing() -> None:
    ill = replace(WELL, entropy=[0.0, 0.0], token_information=[0.0, 0.0], router_grad_norm=[0.0, 0.0], counts=UNEVEN)
    assert len(found(ill)) == 6
    assert not found(ill, replace(FACTS, learns_routing=False))


def test_a_bias_is_inert_if_it_stands_swings_decides_alone_or_is_too_slow_where_the_load_is_uneven() -> None:
    cases = {
        "does not move": ({"bias_change": [0.0, 0.0]}, replace(FACTS, bias_update_rate=0.0)),
        "swings": ({"bias_change": [0.0, 0.0]}, FACTS),
        "decides alone": ({"bias_span": [1.5, 1.5]}, FACTS),
        "needs about 2,900 steps": ({"bias_change": [1e-4, 1e-4]}, FACTS),
    }
    for words, (values, facts) in cases.items():
        (one,) = found(changed(counts=UNEVEN, **values), facts)
        assert (one.alarm, one.layer) == ("inert_bias", 2) and words in one.text
        assert not found(changed(**values), facts), "the load is even"
    assert not found(replace(WELL, counts=UNEVEN)), "290 steps more are few"
    slower = replace(WELL, counts=UNEVEN, bias_change=[4e-4, 4e-4])
    assert not found(slower) and found(slower, replace(FACTS, score="sigmoid")), "scores of sigmoid are larger"
    assert not found(replace(slower, bias_change=[None, None])), "the first line of a process"


def test_null_switches_a_rule_off() -> None:
    off = AlarmsConfig(entropy=None, alike_tokens=None, router_gradient=None, bias_steps=None)
    ill = replace(WELL, entropy=[0.0] * 2, token_information=[0.0] * 2, router_grad_norm=[0.0] * 2, counts=UNEVEN)
    assert not found(ill, config=off)
