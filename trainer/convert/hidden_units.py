"""Hidden units of feed-forward networks: slices, copies and permutations of them, for dense layers and experts alike.

A hidden unit is a row of w_in, or two under swiglu (gate, up), and a column of w_out. The network is the sum over its
units, whatever their order.

# H width before the activation (2 F for swiglu), F hidden units, D d_model.
"""

from dataclasses import dataclass
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

    @classmethod
    def of_layer(cls, layer: FeedForward) -> Self:
        """Return the weights of a dense layer or of shared experts."""
        return cls(layer.w_in.weight.detach(), layer.w_out.weight.detach())

    @classmethod
    def of_expert(cls, experts: Experts, expert: int) -> Self:
        """Return the weights of one expert."""
        return cls(experts.w_in.detach()[expert], experts.w_out.detach()[expert])

    def __len__(self) -> int:
        """Return F."""
        return self.w_out.shape[1]

    @property
    def parts(self) -> int:
        """Rows of w_in that belong to a unit: 2 with a gate."""
        return len(self.w_in) // len(self)

    def take(self, units: Tensor) -> "HiddenUnits":
        """Return the network of these units, in this order."""
        rows = torch.cat([units + part * len(self) for part in range(self.parts)])
        return HiddenUnits(self.w_in.index_select(0, rows), self.w_out.index_select(1, units))

    def scaled(self, factor: float) -> "HiddenUnits":
        """Return the network whose output is this one's times a factor."""
        return self if factor == 1 else HiddenUnits(self.w_in, self.w_out * factor)

    def spread(self, factor: float) -> "HiddenUnits":
        """Return the network with a factor spread evenly over its matrices, as if the activation were linear."""
        root = factor ** (1 / (self.parts + 1))
        return HiddenUnits(self.w_in * root, self.w_out * root)

    def features(self) -> Tensor:
        """Return (F, (parts + 1) D): all weights of each unit."""
        rows = self.w_in.unflatten(0, (self.parts, -1)).transpose(0, 1).flatten(1)
        return torch.cat([rows, self.w_out.T], dim=1)

    @torch.no_grad()
    def copy_to(self, other: "HiddenUnits") -> None:
        """Copy into the memory of another network of the same shape."""
        other.w_in.copy_(self.w_in)
        other.w_out.copy_(self.w_out)


def sum_of_networks(networks: list[HiddenUnits]) -> HiddenUnits:
    """Return the sum of networks as one network, with the units of the first one first."""
    parts = [network.w_in.unflatten(0, (network.parts, -1)) for network in networks]
    return HiddenUnits(torch.cat(parts, dim=1).flatten(0, 1), torch.cat([n.w_out for n in networks], dim=1))
