"""The `optim` and `schedule` sections: every optimizer's and schedule's options. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import Field

from trainer.config.base import Config
from trainer.config.numbers import Coefficient, Epsilon, Whole
from trainer.optim import schedule

Fraction = Annotated[float, Field(ge=0, le=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]
LearningRate = Annotated[float, Field(gt=0, le=1e3)]


class AdamWConfig(Config):
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101); norms, biases and embeddings are not decayed."""

    kind: Literal["adamw"] = "adamw"
    weight_decay: Coefficient = 0.1
    """Decoupled decay of weight matrices: attention, feed-forward, experts, router gate, output head."""
    betas: Annotated[tuple[Beta, Beta], Field(strict=False)] = (0.9, 0.95)
    """Decay rates of the first and second moment."""
    eps: Epsilon = 1e-8
    """Added to the root of the second moment."""


OptimConfig = AdamWConfig


class WarmupCosineConfig(Config):
    """Linear warmup, then half a cosine down to `final_fraction` of the peak at the last step."""

    kind: Literal["warmup_cosine"] = "warmup_cosine"
    peak_lr: LearningRate = 1e-3
    """Learning rate after warmup."""
    warmup_steps: Whole | None = None
    """Steps of linear warmup. Null: 100, or a tenth of a run shorter than 1000."""
    final_fraction: Fraction = 0.1
    """Learning rate at the end, as a share of the peak."""

    def build(self, *, total_steps: int) -> Callable[[int], float]:
        """Return the learning rate as a function of the 0-based step."""
        return lambda step: schedule.warmup_cosine(
            step,
            total_steps=total_steps,
            peak_lr=self.peak_lr,
            warmup_steps=schedule.default_warmup(total_steps) if self.warmup_steps is None else self.warmup_steps,
            final_fraction=self.final_fraction,
        )


class WarmupStableDecayConfig(Config):
    """Linear warmup, a constant stretch, and a linear decay over the last steps (arXiv 2404.06395)."""

    kind: Literal["warmup_stable_decay"] = "warmup_stable_decay"
    peak_lr: LearningRate = 1e-3
    """Learning rate after warmup."""
    warmup_steps: Whole | None = None
    """Steps of linear warmup. Null: 100, or a tenth of a run shorter than 1000."""
    decay_fraction: Fraction = 0.2
    """Share of the run, at its end, over which the learning rate falls."""
    final_fraction: Fraction = 0.0
    """Learning rate at the end, as a share of the peak."""

    def build(self, *, total_steps: int) -> Callable[[int], float]:
        """Return the learning rate as a function of the 0-based step."""
        return lambda step: schedule.warmup_stable_decay(
            step,
            total_steps=total_steps,
            peak_lr=self.peak_lr,
            warmup_steps=schedule.default_warmup(total_steps) if self.warmup_steps is None else self.warmup_steps,
            decay_fraction=self.decay_fraction,
            final_fraction=self.final_fraction,
        )


ScheduleConfig = Annotated[WarmupCosineConfig | WarmupStableDecayConfig, Field(discriminator="kind")]
