"""Contracts of optimizers and schedules."""

import math

import torch
from torch import nn

from trainer.contracts.ensure import ensure
from trainer.optim.create import MOMENTS
from trainer.optim.registry import OptimizerOptions, WarmupOptions

_STEPS = 200


def loss_falls(config: OptimizerOptions) -> None:
    """A quadratic loss falls."""
    weight = nn.Parameter(torch.linspace(-1, 1, 12).view(4, 3))
    before = float(weight.detach().square().sum())
    _train(config, weight, num_steps=50)
    after = float(weight.detach().square().sum())
    ensure(after < before, f"the loss is {before:g} before and {after:g} after 50 steps")


def state_is_two_moments(config: OptimizerOptions) -> None:
    """The state of a parameter is `step`, `exp_avg` and `exp_avg_sq`, of its shape, which checkpoints hold."""
    weight = nn.Parameter(torch.ones(4, 3))
    state = _train(config, weight, num_steps=2).state[weight]
    ensure(set(state) == {"step", *MOMENTS}, f"the state has {sorted(state)}")
    for name in MOMENTS:
        ensure(state[name].shape == weight.shape, f"{name} has shape {tuple(state[name].shape)}, not (4, 3)")


def elements_are_updated_alone(config: OptimizerOptions) -> None:
    """Each element is updated by itself, so that weights can be sharded."""
    values = torch.linspace(-1, 1, 12).view(4, 3)
    whole, part = nn.Parameter(values.clone()), nn.Parameter(values[:2].clone())
    for weight in (whole, part):
        _train(config, weight, num_steps=3)
    ensure(torch.allclose(whole[:2], part), "rows of a weight move differently when they are a weight of their own")


OPTIMIZER_CHECKS = [loss_falls, state_is_two_moments, elements_are_updated_alone]


def _train(config: OptimizerOptions, weight: nn.Parameter, *, num_steps: int) -> torch.optim.Optimizer:
    optimizer = config.build(decayed=[weight], not_decayed=[])
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    for _ in range(num_steps):
        optimizer.zero_grad()
        weight.square().sum().backward()
        optimizer.step()
    return optimizer


def rates_are_rates(config: WarmupOptions) -> None:
    """Every step's learning rate is finite, not negative and at most the peak."""
    for step, lr in enumerate(map(config.build(total_steps=_STEPS), range(_STEPS))):
        is_rate = math.isfinite(lr) and 0 <= lr <= config.peak_lr * (1 + 1e-9)
        ensure(is_rate, f"step {step}: {lr} is not between 0 and peak_lr {config.peak_lr}")


def rates_are_functions_of_the_step(config: WarmupOptions) -> None:
    """The learning rate depends on the step alone, so that a resumed run has the same."""
    forth = list(map(config.build(total_steps=_STEPS), range(_STEPS)))
    back = [config.build(total_steps=_STEPS)(step) for step in reversed(range(_STEPS))]
    ensure(forth == back[::-1], "steps in another order get other learning rates")


SCHEDULE_CHECKS = [rates_are_rates, rates_are_functions_of_the_step]
