"""The `optim` and `schedule` sections: options of all optimizers and schedules. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from trainer.config.base import Problem
from trainer.config.numbers import Coefficient, Epsilon, Whole
from trainer.config.plugins import KindConfig, Pluggable
from trainer.optim import schedule

if TYPE_CHECKING:
    from trainer.optim.adamw import Optimizer, Parameters

Fraction = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
LearningRate = Annotated[float, Field(gt=0, le=1e3)]
WarmupShare = Annotated[float, Field(ge=0, le=1e6)]


class OptimizerOptions(KindConfig):
    """Base class of all optimizer configs.

    The state of a parameter is `step` and two tensors of its shape, `exp_avg` and `exp_avg_sq`, and updates are
    element-wise, so that weights can be sharded and checkpoints loaded into another layout.
    """

    weight_decay: Coefficient = 0.1
    """Decoupled decay of weight matrices: attention, feed-forward, experts, router gate, output head."""

    def build(self, *, decayed: Parameters, not_decayed: Parameters) -> Optimizer:
        """Create the optimizer for two groups of parameters; the learning rate is set before every step."""
        raise NotImplementedError


class AdamWConfig(OptimizerOptions):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101); norms, biases and embeddings are not decayed."""

    kind: Literal["adamw"] = "adamw"
    betas: Annotated[tuple[Beta, Beta], Field(strict=False)] = (0.9, 0.95)
    """Decay rates of the first and second moment."""
    eps: Epsilon = 1e-8
    """Added to the root of the second moment."""

    def build(self, *, decayed: Parameters, not_decayed: Parameters) -> Optimizer:
        """Create the optimizer."""
        from trainer.optim.adamw import build_adamw

        return build_adamw(decayed=decayed, not_decayed=not_decayed, **self.model_dump(exclude={"kind"}))


OptimConfig = Annotated[AdamWConfig, Pluggable("optimizers", OptimizerOptions)]


class WarmupOptions(KindConfig):
    """Linear warmup, shared by all schedules."""

    peak_lr: LearningRate = 1e-3
    """Learning rate after warmup."""
    warmup_steps: Whole | WarmupShare | None = None
    """Steps of linear warmup; or, below 1, a fraction of the run. Null: 100, or a tenth of a run below 1000 steps."""

    def problems(self) -> Iterator[Problem]:
        """Refuse a number that is neither steps nor a fraction."""
        warmup = self.warmup_steps
        if isinstance(warmup, float) and warmup >= 1:
            yield Problem(
                "warmup_steps",
                f"{warmup} is not a fraction of the run; use less than 1, or {math.ceil(warmup)} for that many steps",
            )

    def build(self, *, total_steps: int) -> Callable[[int], float]:
        """Return the learning rate as a function of the 0-based step."""
        raise NotImplementedError

    def arguments(self, total_steps: int) -> dict[str, Any]:
        """Return the options as keyword arguments of the schedule, with the warmup in steps."""
        warmup_steps = schedule.resolve_warmup(self.warmup_steps, total_steps)
        return {**self.model_dump(exclude={"kind"}), "total_steps": total_steps, "warmup_steps": warmup_steps}


class WarmupCosineConfig(WarmupOptions):
    """Linear warmup, then half a cosine down to `final_fraction` of the peak at the last step."""

    kind: Literal["warmup_cosine"] = "warmup_cosine"
    final_fraction: Fraction = 0.1
    """Final learning rate, as a fraction of the peak."""

    def build(self, *, total_steps: int) -> Callable[[int], float]:
        """Return the learning rate as a function of the 0-based step."""
        return partial(schedule.warmup_cosine, **self.arguments(total_steps))


class WarmupStableDecayConfig(WarmupOptions):
    """Linear warmup, a constant phase, and linear decay over the last steps (arXiv 2404.06395)."""

    kind: Literal["warmup_stable_decay"] = "warmup_stable_decay"
    decay_fraction: Fraction = 0.2
    """Fraction of the run, at its end, over which the learning rate decays; at most the steps after warmup."""
    final_fraction: Fraction = 0.0
    """Final learning rate, as a fraction of the peak."""

    def build(self, *, total_steps: int) -> Callable[[int], float]:
        """Return the learning rate as a function of the 0-based step."""
        return partial(schedule.warmup_stable_decay, **self.arguments(total_steps))


ScheduleConfig = Annotated[
    WarmupCosineConfig | WarmupStableDecayConfig, Field(discriminator="kind"), Pluggable("schedules", WarmupOptions)
]
