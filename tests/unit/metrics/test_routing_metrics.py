"""Routing metrics of two layers, against values computed by hand."""

import torch

from trainer.metrics.routing_metrics import routing_metrics


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
