"""Learning rates of groups: split once, the same weights, for any optimizer."""

from collections.abc import Iterable
from typing import Literal

import torch
from torch import nn

from trainer.optim.create import RATE_FACTOR, create_optimizer, scale_rates, set_rate
from trainer.optim.registry import AdamWConfig, OptimizerOptions


class AdagradOptions(OptimizerOptions):
    """A plug-in that knows nothing of factors."""

    kind: Literal["adagrad"] = "adagrad"

    def build(self, *, decayed: Iterable[nn.Parameter], not_decayed: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """Create the optimizer."""
        groups = [{"params": list(decayed), "weight_decay": 0.5}, {"params": list(not_decayed), "weight_decay": 0.0}]
        return torch.optim.Adagrad(groups, lr=1.0)


def _weights() -> list[nn.Parameter]:
    return [nn.Parameter(torch.full((2, 2), float(number))) for number in range(1, 5)]


def _moved(optimizer: torch.optim.Optimizer, weights: list[nn.Parameter], lr: float) -> list[float]:
    before = [w.detach().clone() for w in weights]
    for weight in weights:
        weight.grad = torch.zeros_like(weight)  # only decay moves it
    set_rate(optimizer.param_groups, lr)
    optimizer.step()
    return [float((1 - w.detach() / b)[0, 0]) for w, b in zip(weights, before, strict=True)]


def test_decay_goes_by_the_rate_of_the_group() -> None:
    weights = _weights()
    optimizer = create_optimizer(AdamWConfig(weight_decay=0.5), decayed=weights[:3], not_decayed=weights[3:])
    scale_rates(optimizer, dict(zip(weights, (1.0, 0.25, 2.0, 2.0), strict=True)))
    torch.testing.assert_close(
        torch.tensor(_moved(optimizer, weights, 0.1)), torch.tensor([0.05, 0.0125, 0.1, 0.0]), rtol=1e-5, atol=1e-7
    )


def test_groups_are_split_for_plug_ins_too_and_keep_their_options() -> None:
    weights = _weights()
    optimizer = AdagradOptions().build(decayed=weights[:3], not_decayed=weights[3:])
    scale_rates(optimizer, dict(zip(weights, (1.0, 0.25, 1.0, 0.25), strict=True)))
    set_rate(optimizer.param_groups, 0.1)
    keys = ("params", RATE_FACTOR, "lr", "weight_decay")
    found = [tuple(group[key] for key in keys) for group in optimizer.param_groups]
    first, second, third, fourth = weights
    assert found == [([first, third], 1.0, 0.1, 0.5), ([second], 0.25, 0.025, 0.5), ([fourth], 0.25, 0.025, 0.0)]


def test_factors_of_one_change_no_group() -> None:
    weights = _weights()
    optimizer = create_optimizer(AdamWConfig(), decayed=weights[:3], not_decayed=weights[3:])
    before = [dict(group) for group in optimizer.param_groups]
    scale_rates(optimizer, dict.fromkeys(weights, 1.0))
    assert optimizer.param_groups == before
