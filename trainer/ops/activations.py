"""Activation functions of feed-forward networks, as values. Imports no torch."""

from dataclasses import dataclass
from typing import Final, Literal


@dataclass(frozen=True, slots=True)
class ClampedSwiGLU:
    """GPT-OSS's SwiGLU: (up + 1) * gate * sigmoid(alpha * gate), of a gate of at most `limit` and |up| <= `limit`."""

    alpha: float = 1.702
    limit: float = 7.0


Activation = Literal["swiglu", "gelu"] | ClampedSwiGLU
ACTIVATIONS: Final[tuple[Activation, ...]] = ("swiglu", "gelu", ClampedSwiGLU())
"""One of each."""


def hidden_width(d_ff: int, activation: Activation) -> int:
    """Return the width before the activation, H: twice d_ff if there is a gate, which then comes first."""
    return d_ff if activation == "gelu" else 2 * d_ff
