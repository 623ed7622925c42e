"""Hidden units of feed-forward networks: slices, copies and permutations of them, for dense layers and experts alike.

A hidden unit is a row of w_in, or two with a gate (gate, up), and a column of w_out. The network is the sum over its
units, whatever their order.

# H width before the activation (2 F with a gate), F hidden units, D d_model.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from trainer.models.feed_forward import FeedForward
from trainer.moe.experts import Experts


@dataclass(frozen=True, slots=True, eq=False)
class HiddenUnits:
    """Weights of one feed-forward network."""

    w_in: Tensor
    """(H, D)."""
    w_out: Tensor
    """(D, F)."""
    w_in_bias: Tensor | None = None
    """(H,)."""
    w_out_bias: Tensor | None = None
    """(D,), of all units together."""

    @classmethod
    def of_layer(cls, layer: FeedForward) -> Self:
        """Return the weights of a dense layer or of shared experts, in their memory."""
        return cls(layer.w_in.weight.detach(), layer.w_out.weight.detach())

    @classmethod
    def of_expert(cls, experts: Experts, expert: int) -> Self:
        """Return the weights of one expert, in its memory."""
        return cls(**{name: weight.detach()[expert] for name, weight in experts.named_parameters()})

    def __len__(self) -> int:
        """Return F."""
        return self.w_out.shape[1]

    @property
    def parts(self) -> int:
        """Rows of w_in that belong to a unit: 2 with a gate."""
        return len(self.w_in) // len(self)

    def take(self, units: Tensor) -> "HiddenUnits":
        """Return the network of these units, in this order, with their share of the last bias."""
        units = units.to(self.w_in.device)
        rows = torch.cat([units + part * len(self) for part in range(self.parts)])
        b_in, b_out, share = self.w_in_bias, self.w_out_bias, len(units) / len(self)
        return HiddenUnits(
            self.w_in.index_select(0, rows),
            self.w_out.index_select(1, units),
            None if b_in is None else b_in.index_select(0, rows),
            None if b_out is None else b_out * share,
        )

    def scaled(self, factor: float) -> "HiddenUnits":
        """Return the network whose output is this one's times a factor."""
        b_out = self.w_out_bias
        return replace(self, w_out=self.w_out * factor, w_out_bias=None if b_out is None else b_out * factor)

    def spread(self, factor: float) -> "HiddenUnits":
        """Return the network with a factor spread evenly over its matrices, as if the activation were linear."""
        root = factor ** (1 / (self.parts + 1))
        return replace(self, w_in=self.w_in * root, w_out=self.w_out * root)

    def features(self) -> Tensor:
        """Return (F, n): all weights of each unit."""
        w_in = self.w_in if self.w_in_bias is None else torch.cat([self.w_in, self.w_in_bias[:, None]], dim=1)
        rows = w_in.unflatten(0, (self.parts, -1)).transpose(0, 1).flatten(1)
        return torch.cat([rows, self.w_out.T], dim=1)

    def noisy(self, noise: float, generator: torch.Generator) -> "HiddenUnits":
        """Return the network with Gaussian noise of `noise` standard deviations of each matrix, drawn on the CPU."""
        w_in, w_out = (weight + noise_like(weight, noise, generator) for weight in (self.w_in, self.w_out))
        return replace(self, w_in=w_in, w_out=w_out)

    @torch.no_grad()
    def copy_to(self, other: "HiddenUnits") -> None:
        """Copy into the memory of another network of the same shape; biases that this one has not are 0."""
        other.w_in.copy_(self.w_in)
        other.w_out.copy_(self.w_out)
        for mine, theirs in ((self.w_in_bias, other.w_in_bias), (self.w_out_bias, other.w_out_bias)):
            if theirs is not None:
                theirs.copy_(torch.zeros_like(theirs) if mine is None else mine)


def noise_like(weight: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    """Draw Gaussian noise of `noise` standard deviations of a weight, on the CPU, the same for every device."""
    drawn = torch.randn(weight.shape, generator=generator)
    return (noise * weight.std(correction=0).cpu() * drawn).to(weight)


def sum_of_networks(networks: Sequence[HiddenUnits]) -> HiddenUnits:
    """Return the sum of networks without biases as one network, with the units of the first one first."""
    w_in = torch.cat([network.w_in.unflatten(0, (network.parts, -1)) for network in networks], dim=1)
    return HiddenUnits(w_in.flatten(0, 1), torch.cat([network.w_out for network in networks], dim=1))


def mean_of_networks(networks: Sequence[HiddenUnits], weights: Sequence[float]) -> HiddenUnits:
    """Return the weighted mean of networks of one shape, unit by unit; the weights add up to 1."""
    names = [name for name in ("w_in", "w_out", "w_in_bias", "w_out_bias") if getattr(networks[0], name) is not None]
    means = {name: weighted_mean([getattr(network, name) for network in networks], weights) for name in names}
    return replace(networks[0], **means)


def weighted_mean(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return the weighted sum of tensors, added in float64; the weights add up to 1."""
    total = torch.zeros_like(tensors[0], dtype=torch.float64)
    for tensor, weight in zip(tensors, weights, strict=True):
        total += tensor.to(total) * weight
    return total.to(tensors[0].dtype)
