"""Exponential moving average of the weights that learn."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from trainer.engine.config import EMAConfig
from trainer.models.gpt import GPT
from trainer.parallel.accumulate import free_gathered
from trainer.parallel.shards import local


class WeightAverage:
    """The average of each weight that learns, held as the weight is: same dtype, same experts, same shard.

        average = d * average + (1 - d) * weight        d = decay, or min(decay, (1 + n) / (10 + n)) with `warmup`

    Until `start_step` it is a copy of the weights, so it never contains zeros and needs no correction by 1 - d^n.
    Frozen weights are their own average; buffers, such as a router's bias, are not averaged.
    """

    def __init__(self, config: EMAConfig, model: GPT) -> None:
        """Begin at the model's weights."""
        self._config, self._model = config, model
        self._weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.tensors = {name: p.detach().clone() for name, p in self._weights.items()}
        """Average of each weight, by the name of the parameter."""
        self.num_updates = 0

    @torch.no_grad()
    def update(self, optimizer_steps: int) -> None:
        """Take in the weights after an optimizer step that was taken; not collective."""
        config, after = self._config, optimizer_steps - self._config.start_step
        averages, weights = self._local()
        if after <= 0:
            torch._foreach_copy_(averages, weights)
        elif after % config.every == 0:
            n = self.num_updates
            decay = min(config.decay, (1 + n) / (10 + n)) if config.warmup else config.decay
            torch._foreach_lerp_(averages, weights, 1 - decay)
            self.num_updates += 1

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Put the averages in the place of the weights, and these in theirs, until the end of the context."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        free_gathered(self._model)
        for average, weight in zip(*self._local(), strict=True):
            kept = weight.clone()  # one at a time: no third copy of the model
            weight.copy_(average)
            average.copy_(kept)

    def _local(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return the averages and the weights on this rank."""
        return [local(t) for t in self.tensors.values()], [local(p) for p in self._weights.values()]
