"""Measure the difference of two layouts' numbers, so that rounding alone is none.

A relative error is one of sums of another order, as long as the number is as large as what it is a sum of. Where
terms cancel it is not: a gradient that is 0 on paper is rounding, 1e-16 here and 2e-16 there. So a number that is small
beside its step is compared with a share of that step's size, the floor.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.prove.evidence import Evidence

TOLERANCES = {"float64": 1e-9, "float32": 1e-5, "bfloat16": 0.05}
"""Largest relative error that the order of the sums explains."""
FLOORS = {"float64": 1e-5, "float32": 0.02, "bfloat16": 0.02}
"""Share of a step's size below which a number is compared with that share.

Times the tolerance it is what sums of another order do to a gradient, which was measured over models, losses and
routers: 3 rounding units of the step's size in float64 (45 are allowed) and 0.6 in float32 (1.7), in no tensor more.
"""
_UNITS = {"loss": 10.0, "balance": 1.0, "z": 1.0, "further": 1.0}
"""Size of the terms of a scalar: logits of about 10, probabilities."""
_NORM_UNITS = 10.0
"""A norm adds up the rounding of every weight: 8 rounding units of the objective were measured, of one element 0.4."""
_LONGEST_STEP = 2.0
"""AdamW moves a weight by the learning rate at most, or little more: two copies part by twice that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ruler:
    """Measures a layout's numbers against those of one process."""

    reference: Evidence
    tolerance: float
    """Largest error that counts as equal."""
    floor: float
    """One of `FLOORS`; 0: errors are relative however small a number is."""

    @property
    def step_size(self) -> float:
        """Scale of the first step's gradient: its norm, or the objective where that has no slope."""
        return max(self.reference.grad_norms[0], abs(self.reference.objectives[0]))

    @property
    def noise(self) -> float:
        """Largest rounding error of an element of the first step's gradient."""
        return self.tolerance * self.floor * self.step_size

    def scalar(self, group: str, step: int, mine: float, theirs: float) -> float:
        """Return the error of a loss or norm of a step."""
        unit = _NORM_UNITS * abs(self.reference.objectives[step]) if group == "norm" else _UNITS[group]
        return _ratio(abs(mine - theirs) if mine != theirs else 0.0, max(abs(theirs), self.floor * unit))

    def gradient(self, name: str, mine: Tensor) -> float:
        """Return the largest error of a weight's gradient, over its largest element."""
        theirs = self.reference.gradients[name]
        return _ratio(_apart(mine, theirs), max(_largest(theirs), self.floor * self.step_size))

    def is_rounding(self, name: str) -> bool:
        """Tell whether a weight's gradient in the first step is nothing but rounding."""
        theirs = self.reference.gradients.get(name)
        return theirs is not None and 0 < _largest(theirs) <= self.noise

    def weight(self, name: str, mine: Tensor, theirs: Tensor, *, steps: int) -> float:
        """Return the largest error of a weight or buffer after some steps, over its largest element.

        AdamW divides a gradient by its own size and `eps`: of rounding it can make a step that is far larger.
        """
        size = _largest(theirs)
        if self.floor and self.is_rounding(name):
            far = sum(self.reference.learning_rates[:steps])
            size = max(size, far * min(_LONGEST_STEP, self.noise / self.reference.adam_eps) / self.tolerance)
        return _ratio(_apart(mine, theirs), size)


def _apart(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape:
        return float("inf")
    return float((a.double() - b.double()).abs().max()) if a.numel() and not torch.equal(a, b) else 0.0


def _largest(tensor: Tensor) -> float:
    return float(tensor.double().abs().max()) if tensor.numel() else 0.0


def _ratio(apart: float, size: float) -> float:
    return apart / max(size, 1e-30) if apart != 0 else 0.0
