"""Small sums of an optimizer step, and their all-reduce in one message.

# L MoE layers, E experts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from trainer.distributed.collectives import Group
from trainer.engine.base import RoutingSums
from trainer.engine.moe_layers import MoELayers
from trainer.models.gpt import GPTOutput
from trainer.moe.losses import Objective
from trainer.ops.tensor_sums import as_message, from_message


@dataclass(slots=True)
class StepTotals:
    """Sums of the micro-batches' shares, kept on the device until the end of the step."""

    loss: Tensor | float = 0.0
    objective: Tensor | float = 0.0
    """Cross-entropy plus auxiliary losses."""
    balance_loss: Tensor | None = None
    z_loss: Tensor | None = None
    prob_sum: Tensor | None = None
    """(L, E) router probabilities over all rows; (L, E + 1) with null experts."""
    extra: dict[str, Tensor] = field(default_factory=dict)
    """Further losses, by name."""

    def add(self, share: Objective, output: GPTOutput, layers: MoELayers) -> None:
        """Add a micro-batch, or the part of it that has these MoE layers."""
        self.loss = self.loss + share.loss
        self.objective = self.objective + share.total.detach()
        if share.balance_loss is not None:
            self.balance_loss = share.balance_loss + (0 if self.balance_loss is None else self.balance_loss)
            here = [stats.prob_sum.detach().sum(0) for stats in output.moe if stats.prob_sum is not None]
            self.prob_sum = layers.placed(torch.stack(here)) + (0 if self.prob_sum is None else self.prob_sum)
        if share.z_loss is not None:
            self.z_loss = share.z_loss + (0 if self.z_loss is None else self.z_loss)
        for name, value in share.extra.items():
            self.extra[name] = value + self.extra.get(name, 0)

    def numbers(self) -> dict[str, Tensor]:
        """Return the losses that exist, by name."""
        named = {"loss": self.loss, "objective": self.objective, "balance_loss": self.balance_loss}
        every = {**named, "z_loss": self.z_loss, **self.extra}
        return {name: torch.as_tensor(value) for name, value in every.items() if value is not None}

    def tensors(self) -> list[Tensor]:
        """Return the sums that exist, in a fixed order."""
        sums = (torch.as_tensor(self.loss), torch.as_tensor(self.objective))
        every = (*sums, self.balance_loss, self.z_loss, self.prob_sum, *self.extra.values())
        return [tensor for tensor in every if tensor is not None]

    def with_tensors(self, tensors: Sequence[Tensor]) -> Self:
        """Return a copy with these values in place of `tensors()`, in their own (wider) dtype."""
        values = iter(tensors)
        return type(self)(
            loss=next(values),
            objective=next(values),
            balance_loss=None if self.balance_loss is None else next(values),
            z_loss=None if self.z_loss is None else next(values),
            prob_sum=None if self.prob_sum is None else next(values),
            extra={name: next(values) for name in self.extra},
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Accumulated:
    """State of a step between its last backward pass and its update; sums are over all ranks."""

    total: StepTotals
    local_objective: Tensor
    """This rank's share of the objective."""
    choices: Tensor
    """(L, E) assignments counted by the balance loss; (L, E + 1) with null experts."""
    routing: RoutingSums | None
    grad_norm: Tensor
    """2-norm of the whole gradient in float64; every weight is counted once, however many ranks hold it."""
    num_tokens: int
    experts: Sequence[Tensor] = ()
    """(B, S, L, k) experts of each micro-batch, if requested."""


def square_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Return the squared 2-norm of all these gradients together, in float64."""
    return torch.nn.utils.get_total_norm(gradients, foreach=True).double().square()


def all_reduce_packed(parts: Sequence[Tensor], group: Group) -> list[Tensor]:
    """All-reduce several small tensors over a group in one message of float64, which represents every count exactly."""
    return from_message(group.all_reduce_(as_message(parts)), parts)


def read_numbers(numbers: Mapping[str, Tensor]) -> dict[str, float]:
    """Copy scalars to the host, all at once: a single wait for the device."""
    return dict(zip(numbers, torch.stack([number.double() for number in numbers.values()]).tolist(), strict=True))


def group_squares(
    groups: Sequence[Sequence[str]], pieces: Mapping[str, Sequence[Tensor]], device: torch.device
) -> Tensor:
    """Return the squared norm of each group of named gradients (L,), in float64; NaN for a group of none."""
    none, squares = torch.zeros((), dtype=torch.float64, device=device), []
    for names in groups:
        here = [piece for name in names for piece in pieces.get(name, ())]
        squares.append(square_norm(here).to(device) if here else none if names else none / 0)
    return torch.stack(squares)
