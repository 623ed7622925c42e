"""Experts of a layer in another number: the most used ones, or all and noisy copies of these.

# E experts there, E' here, n null experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from trainer.convert.hidden_units import noise_like
from trainer.convert.parent_tensors import ParentTensors
from trainer.models.parameter_roles import parameter_role
from trainer.ops.noise import stable_hash

NOISE: Final = 0.1
"""Standard deviation of the noise on a copy, in those of each matrix, as that of `surgery add`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertChoice:
    """Experts of one layer."""

    sources: Sequence[int]
    """(E',) the expert there that each one here is taken from."""
    copies: frozenset[int]
    """Those here that are not the first of their source."""
    num_there: int
    """E."""


def choose_experts(counts: Sequence[int], num_experts: int, *, groups: int = 1) -> ExpertChoice:
    """Return the source of each of `num_experts` experts, given the assignments (E,) to each there.

    Fewer: those with the most assignments keep their order; of equal ones the earlier. More: all, and after them copies
    in turn, beginning with the most used. Each of the router's groups keeps, or gets, as many.
    """
    before, after = len(counts) // groups, num_experts // groups
    sources: list[int] = []
    copies: set[int] = set()
    for group in range(groups):
        all_here = range(group * before, (group + 1) * before)
        by_use = sorted(all_here, key=lambda e: (-counts[e], e))
        if after <= before:
            sources += sorted(by_use[:after])
            continue
        first = len(sources) + before
        sources += [*all_here, *(by_use[i % before] for i in range(after - before))]
        copies |= set(range(first, len(sources)))
    return ExpertChoice(sources=sources, copies=frozenset(copies), num_there=len(counts))


class ResizedExperts:
    """A tensor with a dimension that counts experts, for another number of them; null experts keep their columns."""

    def __init__(self, parent: ParentTensors, name: str, choice: ExpertChoice, *, dim: int, of: str, seed: int) -> None:
        """Create the source of parameter or buffer `of` of the new model, from a tensor of the other.

        The noise on copies depends on the seed, the name and the expert.
        """
        self._parent, self._name, self._dim, self._of, self._seed = parent, name, dim, of, seed
        nulls = range(choice.num_there, parent.tensors[name].shape[dim])
        self._sources, self._copies = [*choice.sources, *nulls], choice.copies

    def rows(self, start: int, length: int) -> Tensor:
        """Return indices start .. start + length - 1 of dimension 0."""
        if self._dim == 0:
            there = (self._parent.read(self._name, self._sources[i], 1)[0] for i in range(start, start + length))
            return torch.stack([self._noisy(i, part) for i, part in enumerate(there, start)])
        whole = self._parent.read(self._name, 0, self._parent.tensors[self._name].shape[0])
        parts = [self._noisy(i, whole.select(self._dim, e)) for i, e in enumerate(self._sources)]
        return torch.stack(parts, dim=self._dim)[start : start + length]

    def _noisy(self, i: int, part: Tensor) -> Tensor:
        """Return the part of expert i, with noise if that is a copy: biases stay as they are."""
        least = 2 if parameter_role(self._of) == "expert" else 1
        if i not in self._copies or part.dim() < least:
            return part
        generator = torch.Generator().manual_seed(stable_hash("init_from", self._seed, self._of, i))
        return part + noise_like(part, NOISE, generator)
