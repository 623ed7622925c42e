"""Properties of an experts' layer that a kernel may depend on, and their form on which a canary runs."""

from dataclasses import dataclass, replace

import torch

from trainer.ops.activations import Activation, ClampedSwiGLU, hidden_width

_WIDEST = 256
"""Wider layers are narrowed to about this, so that the oracle takes less than a second on one core."""
_FEWEST = 16
"""Fewer numbers of a token can nearly cancel, so that a sound kernel is far off in proportion."""
_FAR_LIMIT = 64.0
"""Values have a spread of about 1."""
_ALIGNMENT = 64
"""A narrowed width keeps its remainder modulo this, and with it the alignment that kernels depend on."""
_LARGEST_SCALE = 4.0
"""Larger additions would hide what is wrong with the weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterWidths:
    """Properties of the low-rank additions to the experts' weights."""

    rank: int
    scale: float
    of_w_in: bool
    of_w_out: bool

    @property
    def is_of(self) -> tuple[bool, bool]:
        """Whether w_in and w_out have one."""
        return self.of_w_in, self.of_w_out


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerWidths:
    """Properties of an experts' layer that a kernel may depend on: widths, activation, biases, adapters and dtype."""

    d_model: int
    d_ff: int
    activation: Activation
    dtype: torch.dtype
    has_bias: bool = False
    adapters: AdapterWidths | None = None
    """Low-rank additions to the weights; None: neither has one."""
    is_frozen: bool = False
    """The weights and biases get no gradient."""

    @property
    def hidden(self) -> int:
        """Width before the activation, H."""
        return hidden_width(self.d_ff, self.activation)

    def narrowed(self) -> "LayerWidths":
        """Return widths that are as aligned as these, neither much more than 256 nor so few that a norm can cancel.

        A limit of the activation becomes one that no value comes near: rounding may take a value across, where the
        gradient is another.
        """
        d_model, d_ff = (_canary_width(width) for width in (self.d_model, self.d_ff))
        activation = self.activation
        if isinstance(activation, ClampedSwiGLU):
            activation = replace(activation, limit=_FAR_LIMIT)
        adapters = self.adapters
        if adapters is not None:
            rank = adapters.rank if adapters.rank < _WIDEST + _ALIGNMENT else _canary_width(adapters.rank)
            adapters = replace(adapters, rank=rank, scale=min(adapters.scale, _LARGEST_SCALE))
        return replace(self, d_model=d_model, d_ff=d_ff, activation=activation, adapters=adapters)


def _canary_width(width: int) -> int:
    if width < _FEWEST:
        return width + _ALIGNMENT
    return width if width < _WIDEST + _ALIGNMENT else _WIDEST + width % _ALIGNMENT
