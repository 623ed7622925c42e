"""Counter-based noise: a pure function of integer keys, independent of layout, step order and device.

Integers are 32-bit values held in int64 tensors: torch has no unsigned arithmetic on every device, and a product of two
32-bit values keeps its low 32 bits in int64 even where it wraps.
"""

import hashlib
import math

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9  # 2^32 / golden ratio: consecutive multiples are spread evenly


def stable_hash(*parts: int | str) -> int:
    """Return a 63-bit hash of `parts`, equal in every process and on every machine."""
    text = "\x1f".join(f"{type(p).__name__}:{p}" for p in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def mix32(x: Tensor) -> Tensor:
    """Scramble 32-bit integers; a bijection (constants: C. Wellons' lowbias32)."""
    x = x & _MASK
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def token_keys(seed: int, sample_id: Tensor, position: Tensor) -> Tensor:
    """Return the noise key of every token, a function of seed, global row index and position (int64)."""
    seed32 = stable_hash("noise", seed) & _MASK
    high = mix32((sample_id >> 32) + seed32)
    return mix32(mix32((sample_id & _MASK) ^ high) + position * _GOLDEN)


def uniform(key: Tensor, num_columns: int, *, salt: int | str) -> Tensor:
    """Return (T, num_columns) float32 in [0, 1), a function of the token's key, the column and the salt only.

    `salt` separates independent uses of a key (T,), such as layers.
    """
    column = torch.arange(num_columns, device=key.device, dtype=torch.int64) * _GOLDEN
    bits = mix32(mix32(key ^ (stable_hash("salt", salt) & _MASK))[:, None] + column)  # (T, num_columns)
    return (bits >> 8).float() * 2.0**-24  # 24 bits: every value is exact in float32


def standard_normal(key: Tensor, num_columns: int, *, salt: int | str) -> Tensor:
    """Return (T, num_columns) float64 standard normal noise; arguments as in `uniform` (Box and Muller 1958)."""
    radius, angle = uniform(key, 2 * num_columns, salt=salt).double().chunk(2, dim=-1)
    return (-2 * torch.log1p(-radius)).sqrt() * torch.cos(2 * math.pi * angle)
