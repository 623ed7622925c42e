"""Totals of a step are sums over its micro-batches."""

import torch

from trainer.engine.moe_layers import MoELayers
from trainer.engine.reduce import StepTotals, read_numbers
from trainer.metrics.device_waits import DeviceWaits
from trainer.models.gpt import GPTOutput
from trainer.moe.losses import Objective
from trainer.moe.stats import MoEStats


def _stats(prob: float) -> MoEStats:
    rows = torch.zeros(2)
    return MoEStats(
        counts=torch.zeros(2, 3),
        first_choice_counts=torch.zeros(2, 3),
        prob_sum=torch.full((2, 3), prob),
        z_sum=None,
        dropped=rows,
        tokens=rows,
        entropy_sum=None,
    )


def test_totals_add_up_every_part_of_the_objective() -> None:
    totals = StepTotals()
    for value in (1.0, 2.0, 4.0):
        loss, total, balance, z, further = (torch.tensor(value * scale) for scale in (1, 10, 100, 1000, 10000))
        share = Objective(total=total, loss=loss, balance_loss=balance, z_loss=z, extra={"expert_similarity": further})
        totals.add(share, GPTOutput(logits=None, row_loss=torch.zeros(2), moe=(_stats(value),)), MoELayers((0,), 1))
    assert totals.balance_loss is not None and totals.z_loss is not None and totals.prob_sum is not None
    found = (totals.loss, totals.objective, totals.balance_loss, totals.z_loss, totals.extra["expert_similarity"])
    assert [float(one) for one in found] == [7.0, 70.0, 700.0, 7000.0, 70000.0]
    assert totals.prob_sum.tolist() == [[14.0, 14.0, 14.0]]


def test_numbers_of_a_step_are_read_at_once_and_exactly() -> None:
    totals = StepTotals(loss=torch.tensor(0.1), objective=torch.tensor(0.2, dtype=torch.float64))
    totals.extra = {"diversity": torch.tensor(torch.inf)}
    with DeviceWaits() as counted:
        read = read_numbers({**totals.numbers(), "grad_norm": torch.tensor(1 / 3, dtype=torch.float64)})
    assert len(counted.waits) == 1
    assert read == {"loss": float(torch.tensor(0.1)), "objective": 0.2, "diversity": torch.inf, "grad_norm": 1 / 3}
