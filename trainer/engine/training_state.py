"""State of an engine by name: weights, buffers, counters and moments, as slices of global tensors.

# L MoE layers, E experts.
"""

from abc import abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from trainer.checkpoint.state import Slice, TrainState
from trainer.engine.base import Engine
from trainer.models.gpt import GPT
from trainer.models.initialize import expert_parameters
from trainer.parallel.shard import first_row, local


class StatefulEngine(Engine):
    """Saves and loads everything but the optimizer's moments, whose layout is the business of each engine."""

    def __init__(self, model: GPT) -> None:
        self.model, self.moe_config = model, model.config.moe
        self.device = model.embedding.weight.device
        self.parameters = dict(model.named_parameters())
        self.first_expert = expert_parameters(model)
        self.optimizer_steps = 0
        moe = self.moe_config
        columns = 0 if moe is None else moe.num_experts + (moe.router.num_null_experts > 0)
        shape = (len(model.moe_layers()), columns)
        # There is no load before the first step; a uniform one makes the balance loss its constant minimum.
        self.previous_counts = torch.ones(shape, dtype=torch.int64, device=self.device)

    @abstractmethod
    def _moments(self) -> dict[str, Slice]:
        """Return the optimizer's moments, by name. Collective."""

    @abstractmethod
    def _load_moments(self, state: TrainState) -> None:
        """Load the moments, after the weights and the step count."""

    def state(self) -> TrainState:
        """Return weights, buffers, counters and moments, by name. Collective: every rank must call it."""
        return self._with_moments(self._moments())

    @torch.no_grad()
    def load_state(self, state: TrainState) -> None:
        """Load the slices that `wanted` names into weights, buffers, counters and moments."""
        self.optimizer_steps = int(state.values["optimizer_steps"])
        for name, mine in self._without_moments().items():
            mine.tensor.copy_(state.slices[name].tensor)
        self._load_moments(state)

    def _with_moments(self, moments: Mapping[str, Slice]) -> TrainState:
        values = {"optimizer_steps": self.optimizer_steps}
        return TrainState(slices={**self._without_moments(), **moments}, values=values)

    def _without_moments(self) -> dict[str, Slice]:
        """Return weights, buffers and counters, which every engine lays out alike."""
        tensors = {f"model.{name}": p.detach() for name, p in self.parameters.items()}
        tensors |= {f"model.{name}": b for name, b in self.model.named_buffers()}
        tensors["engine.previous_counts"] = self.previous_counts
        return {name: self._slice(name, tensor) for name, tensor in tensors.items()}

    def _slice(self, name: str, tensor: Tensor) -> Slice:
        """Return this rank's slice of a global tensor: its own experts, and its shard of a sharded tensor."""
        parameter = name.partition(".")[2] if name.startswith("model.") else name.split(".", 2)[-1]
        first, shape = self.first_expert.get(parameter), tuple(tensor.shape)
        if first is not None and self.moe_config is not None:
            shape = (self.moe_config.num_experts, *shape[1:])
        return Slice(
            tensor=local(tensor),
            global_shape=shape,
            start=(first or 0) + first_row(tensor),
            is_of_experts=first is not None,
        )
