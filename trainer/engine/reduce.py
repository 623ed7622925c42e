"""The small sums of an optimizer step, and how they are added up over ranks in one message.

# L MoE layers, E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor

from trainer.distributed.collectives import Group
from trainer.engine.base import RoutingSums
from trainer.models.gpt import GPTOutput
from trainer.moe.losses import Objective


@dataclass(slots=True)
class StepTotals:
    """Sums of a step's shares, kept as tensors until its end."""

    loss: Tensor | float = 0.0
    objective: Tensor | float = 0.0
    """Objective: the loss and the auxiliary losses."""
    balance_loss: Tensor | None = None
    z_loss: Tensor | None = None
    prob_sum: Tensor | None = None
    """(L, E) router probabilities over all rows; (L, E + 1) with null experts."""
    extra: dict[str, Tensor] = field(default_factory=dict)
    """Further losses, by name."""

    def add(self, share: Objective, output: GPTOutput) -> None:
        """Add a micro-batch."""
        self.loss = self.loss + share.loss
        self.objective = self.objective + share.total.detach()
        if share.balance_loss is not None:
            self.balance_loss = share.balance_loss + (0 if self.balance_loss is None else self.balance_loss)
            layers = [stats.prob_sum.detach().sum(0) for stats in output.moe if stats.prob_sum is not None]
            self.prob_sum = torch.stack(layers) + (0 if self.prob_sum is None else self.prob_sum)
        if share.z_loss is not None:
            self.z_loss = share.z_loss + (0 if self.z_loss is None else self.z_loss)
        for name, value in share.extra.items():
            self.extra[name] = value + self.extra.get(name, 0)

    def tensors(self) -> list[Tensor]:
        """Return the sums that there are, in a fixed order."""
        sums = (torch.as_tensor(self.loss), torch.as_tensor(self.objective))
        every = (*sums, self.balance_loss, self.z_loss, self.prob_sum, *self.extra.values())
        return [tensor for tensor in every if tensor is not None]

    def replaced(self, tensors: Sequence[Tensor]) -> Self:
        """Return the same with other values, in the order of `tensors`."""
        values = iter(tensors)
        return type(self)(
            loss=next(values),
            objective=next(values),
            balance_loss=None if self.balance_loss is None else next(values),
            z_loss=None if self.z_loss is None else next(values),
            prob_sum=None if self.prob_sum is None else next(values),
            extra={name: next(values) for name in self.extra},
        )


def square_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Return the squared 2-norm of all these gradients together, float64."""
    return torch.nn.utils.get_total_norm(gradients, foreach=True).double().square()


def all_reduce_packed(parts: Sequence[Tensor], group: Group) -> list[Tensor]:
    """Add up several small tensors over a group in one message of float64, which holds every count exactly."""
    flat = group.all_reduce_(torch.cat([part.reshape(-1).double() for part in parts]))
    pieces = flat.split([part.numel() for part in parts])
    return [piece.view(part.shape) for piece, part in zip(pieces, parts, strict=True)]


def routing_tensors(routing: RoutingSums) -> list[Tensor]:
    """Return the sums that there are, in a fixed order."""
    parts = [routing.counts, routing.dropped, routing.tokens, routing.entropy_sum]
    return [part for part in parts if part is not None]


def routing_like(routing: RoutingSums, parts: Sequence[Tensor]) -> RoutingSums:
    """Return sums in the dtypes of `routing`, from tensors in the order of `routing_tensors`."""
    values = [part.to(like.dtype) for part, like in zip(parts, routing_tensors(routing), strict=True)]
    return RoutingSums(
        counts=values[0],
        dropped=values[1],
        tokens=values[2],
        entropy_sum=None if routing.entropy_sum is None else values[3],
    )


def routing_sums(output: GPTOutput) -> RoutingSums | None:
    """Add up the rows of a micro-batch; None for a dense model."""
    if not output.moe:
        return None
    entropies = [stats.entropy_sum.sum() for stats in output.moe if stats.entropy_sum is not None]
    return RoutingSums(
        counts=torch.stack([stats.counts.sum(0) for stats in output.moe]),
        dropped=torch.stack([stats.dropped.sum() for stats in output.moe]),
        tokens=torch.stack([stats.tokens.sum() for stats in output.moe]),
        entropy_sum=torch.stack(entropies) if entropies else None,
    )
