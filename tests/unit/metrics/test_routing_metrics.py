"""Routing metrics of two layers, against values computed by hand."""

import json
import math

import pytest
import torch

from trainer.metrics.bias_watch import BiasWatch
from trainer.metrics.routing_metrics import router_metrics, routing_metrics


def test_metrics_of_two_layers_of_which_one_is_uneven() -> None:
    counts = torch.tensor([[10, 10, 10, 10], [28, 8, 4, 0]])
    found = routing_metrics(
        counts, torch.tensor([0, 20]), torch.tensor([20, 20]), torch.tensor([20.0, 10.0], dtype=torch.float64)
    )
    assert found == {
        "drop_rate": 20 / 80,
        "load_imbalance": 2.8,  # 28 over the mean of 10: that of the worst layer
        "dead_experts": 1,
        "router_entropy": 0.75,
        "experts_per_token": 2,
    }


def test_a_router_that_is_certain_of_different_experts_tells_all_and_one_that_gives_all_the_same_nothing() -> None:
    certain, alike = torch.eye(4).repeat(2, 1), torch.full((8, 4), 0.25)  # probabilities of 8 tokens
    probs = torch.stack([certain, alike]).double()
    found = router_metrics(
        tokens=torch.tensor([8, 8]),
        entropy_sum=torch.special.entr(probs).sum((1, 2)),
        prob_sum=probs.sum(1),
        router_squares=torch.tensor([4.0, float("nan")]),
    )
    assert found["entropy"] == pytest.approx([0.0, math.log(4)], abs=1e-12)
    assert found["token_information"] == pytest.approx([math.log(4), 0.0], abs=1e-12)
    assert found["prob_span"] == pytest.approx([0.0, 0.0], abs=1e-12)
    assert found["router_grad_norm"] == [2.0, None]
    assert router_metrics(tokens=torch.tensor([8]), entropy_sum=None, prob_sum=None, router_squares=None) == {}


def test_a_bias_has_a_span_and_a_pace_per_step() -> None:
    watch, before = BiasWatch(), torch.tensor([[0.0, 0.0, 0.5], [1.0, 1.0, 1.0]])
    assert watch.look(10, before) == {"bias_span": [0.5, 0.0], "bias_change": [None, None]}
    assert watch.look(14, before + torch.tensor([[0.0, -1.0, 0.5], [0.0, 0.0, 0.0]])) == {
        "bias_span": [2.0, 0.0],
        "bias_change": [0.25, 0.0],
    }
    resumed = BiasWatch()
    resumed.restore(json.loads(json.dumps(watch.record())))
    assert resumed.look(15, before) == watch.look(15, before) == {"bias_span": [0.5, 0.0], "bias_change": [1.0, 0.0]}
    assert watch.look(20, None) == {}
