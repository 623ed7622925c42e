"""The pattern of a model's layers, so that a model of fewer layers stands for it. Imports no torch."""

import math
from typing import NamedTuple

from trainer.experiment import ExperimentConfig


class LayerPattern(NamedTuple):
    """Layers that are different, then a period that repeats to the end."""

    head: int
    """Layers before the first period."""
    period: int

    @property
    def sizes(self) -> tuple[int, int]:
        """Numbers of layers of two models that have the same beginning and end: one and two periods in between."""
        fewest = self.head + 2 * self.period
        return fewest, fewest + self.period


def layer_pattern(config: ExperimentConfig) -> LayerPattern | None:
    """Return the pattern of a config's layers; None if fewer layers would need another config, or as much work."""
    model, moe = config.model, config.model.moe
    if moe is not None and moe.layers is not None:
        return None
    head = 0 if moe is None else moe.first_dense_layers
    every = getattr(config.parallel.recompute, "every", 1)
    kinds = 1 if model.attention.window is None else len(model.attention.window_pattern)
    period = math.lcm(1 if moe is None else moe.every, every, kinds)
    head = -(-head // period) * period  # so that every period begins alike
    if config.train.freeze or config.train.lr_scale or model.lora is not None:
        return None  # patterns of names may mean single layers
    pattern = LayerPattern(head, period)
    fits = (model.num_layers - pattern.sizes[0]) % period == 0 and model.num_layers > sum(pattern.sizes)
    return pattern if fits else None
