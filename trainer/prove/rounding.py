"""Measure the difference of two layouts' values such that rounding does not count.

Summing in another order changes a value by a small relative error as long as the value is as large as its terms. Where
terms cancel it does not: a gradient that is mathematically 0 is rounding, 1e-16 in one layout and 2e-16 in another. So
the error of a value that is small compared with its step is taken relative to a share of the step's size, the floor.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.prove.evidence import Evidence

TOLERANCES = {"float64": 1e-9, "float32": 1e-5, "bfloat16": 0.05}
"""Largest relative error that summation order explains."""
FLOORS = {"float64": 1e-5, "float32": 0.02, "bfloat16": 0.02}
"""Share of a step's size below which the error of a value is relative to that share.

Floor times tolerance is the effect of summation order on a gradient, measured over models, losses and routers: at most
3 rounding units of the step's size in float64 (45 are allowed) and 0.6 in float32 (1.7).
"""
_UNITS = {"loss": 10.0, "balance": 1.0, "z": 1.0, "further": 1.0}
"""Size of the terms of a scalar: logits (about 10), probabilities."""
_NORM_UNITS = 10.0
"""A norm sums the rounding of every weight: measured 8 rounding units of the objective, 0.4 for one element."""
_MAX_STEP = 2.0
"""AdamW moves a weight by about the learning rate at most, so two copies differ by at most twice that."""

_TINY = 1e-30


@dataclass(frozen=True, slots=True, kw_only=True)
class Ruler:
    """Measures a layout's errors against one process."""

    reference: Evidence
    tolerance: float
    """Largest error that counts as equal."""
    floor: float
    """One of `FLOORS`; 0: errors are always relative to the value."""

    @property
    def step_size(self) -> float:
        """Scale of the first step's gradient: its norm or, if larger, the objective."""
        return max(self.reference.grad_norms[0], abs(self.reference.objectives[0]))

    @property
    def noise(self) -> float:
        """Largest rounding error of a gradient element in the first step."""
        return self.tolerance * self.floor * self.step_size

    def scalar(self, group: str, step: int, value: float, expected: float) -> float:
        """Return the error of a loss or gradient norm of a step."""
        unit = _NORM_UNITS * abs(self.reference.objectives[step]) if group == "norm" else _UNITS[group]
        return _ratio(abs(value - expected) if value != expected else 0.0, max(abs(expected), self.floor * unit))

    def gradient(self, name: str, value: Tensor) -> float:
        """Return the largest error of a weight's gradient, relative to its largest element."""
        expected = self.reference.gradients[name]
        return _ratio(_max_difference(value, expected), max(_max_abs(expected), self.floor * self.step_size))

    def is_rounding(self, name: str) -> bool:
        """Return whether a weight's gradient in the first step is only rounding error."""
        expected = self.reference.gradients.get(name)
        return expected is not None and 0 < _max_abs(expected) <= self.noise

    def weight(self, name: str, value: Tensor, expected: Tensor, gradient: Tensor | None, *, steps: int) -> float:
        """Return the largest error of a weight or buffer after some steps, relative to its largest element.

        AdamW divides a gradient by its own size plus `eps`, which turns rounding of an element whose gradient nearly
        cancels into a far larger step. So an element may also differ by the learning rate times the rounding seen in
        the layout's first `gradient`, over its size. A weight that started at 0 is the sum of such steps, all of one
        size: there the mean error is taken, in which an element counts as much as its gradient.
        """
        size, own = _max_abs(expected), self.reference.gradients.get(name)
        if not self.floor or own is None or gradient is None or value.shape != expected.shape:
            return _ratio(_max_difference(value, expected), size)
        share, difference = own.double().abs(), (value.double() - expected.double()).abs()
        if self._started_at_zero(name) and not self.is_rounding(name):
            return _ratio(float((share * difference).sum()), float((share * expected.double().abs()).sum()))
        rate = sum(self.reference.learning_rates[:steps]) * self.reference.rate_factors.get(name, 1.0)
        moved = rate * self._step_errors(name, share, gradient)
        sizes = (moved / self.tolerance).clamp(min=max(size, _TINY))
        return float((difference / sizes).max()) if difference.numel() else 0.0

    def _step_errors(self, name: str, share: Tensor, gradient: Tensor) -> Tensor:
        """Return how far rounding moves each element in a step, in learning rates, given the gradient's size."""
        if self.is_rounding(name):
            return torch.full_like(share, min(_MAX_STEP, self.noise / self.reference.adam_eps))
        seen = (gradient.double() - self.reference.gradients[name].double()).abs()
        noise = (seen + seen.square().mean().sqrt()).clamp(max=self.noise)  # by chance an element may show none
        return (noise / (share + self.reference.adam_eps)).clamp(max=_MAX_STEP)

    def _started_at_zero(self, name: str) -> bool:
        return name in self.reference.gradients and _max_abs(self.reference.start[name]) == 0


def _max_difference(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape:
        return float("inf")
    return float((a.double() - b.double()).abs().max()) if a.numel() and not torch.equal(a, b) else 0.0


def _max_abs(tensor: Tensor) -> float:
    return float(tensor.double().abs().max()) if tensor.numel() else 0.0


def _ratio(difference: float, size: float) -> float:
    return difference / max(size, _TINY) if difference != 0 else 0.0
