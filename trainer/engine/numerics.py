"""Numeric options of an optimizer step."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from trainer.engine.config import EMAConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class NumericsConfig:
    """Numeric options of a step, from `train` and `seed`."""

    seed: int
    dtype: torch.dtype
    """Dtype of matrix products; bfloat16 uses autocast over float32 parameters."""
    grad_clip: float | None
    lr_scale: Mapping[str, float] = field(default_factory=dict)
    """Factors of the learning rate, by role or pattern of names."""
    ema: EMAConfig | None = None
    """Moving average of the weights; None: none."""
