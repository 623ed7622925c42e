"""Keys and values of the tokens so far, in rows that grow each by itself.

A token's slot is its position, so a query at position p sees slots 0 .. p; what a slot beyond a row's end holds is
overwritten before any query of that row sees it.

# slot     0  1  2  3  4      lengths
# row 0    a  b  c  d  .      4
# row 1    a  b  .  .  .      2

# L layers, B rows, S new tokens, H query heads, Hkv key and value heads, d head width.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.ops.attention import torch_attention

CachedAttention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""One layer's `Extension.attend`: queries, keys and values of the new tokens in, what they read (B, H, S, d) out."""


@dataclass(slots=True, kw_only=True)
class KVCache:
    """Rows of keys and values."""

    keys: Tensor
    """(L, B, capacity, Hkv, d)."""
    values: Tensor
    lengths: Tensor
    """(B,) int64 tokens in each row."""
    longest: int = 0
    """The longest row, known without asking the device; at least that."""

    @property
    def capacity(self) -> int:
        """Tokens that a row can hold."""
        return self.keys.shape[2]

    def extension(self, num_tokens: int) -> "Extension":
        """Return room for so many more tokens in each row; `grow` says afterwards how many of them are real."""
        end = self.longest + num_tokens
        assert end <= self.capacity, f"{end} tokens in a cache for {self.capacity}"
        columns = torch.arange(num_tokens, device=self.lengths.device)
        positions = self.lengths[:, None] + columns  # (B, S)
        if self.longest == 0:
            return Extension(cache=self, positions=positions, end=end, visible=None)
        slots = torch.arange(end, device=positions.device)
        return Extension(cache=self, positions=positions, end=end, visible=slots <= positions[:, None, :, None])

    def grow(self, num_new: Tensor, at_most: int) -> None:
        """Count the first num_new (B,) tokens of each row as there, of which no row has more than `at_most`."""
        self.lengths = self.lengths + num_new
        self.longest += at_most

    @torch.no_grad()
    def select(self, rows: Tensor, *, capacity: int | None = None) -> "KVCache":
        """Return a cache of some rows, each as often as it is named, with room for `capacity` tokens."""
        room, end = self.capacity if capacity is None else capacity, self.longest
        assert room >= end, f"{end} tokens in a cache for {room}"

        def copied(x: Tensor) -> Tensor:
            chosen = x.new_empty(x.shape[0], len(rows), room, *x.shape[3:])
            torch.index_select(x[:, :, :end], 1, rows, out=chosen[:, :, :end])
            chosen[:, :, end:] = 0  # what nobody may see is still multiplied, by 0: it must be a number
            return chosen

        return KVCache(
            keys=copied(self.keys), values=copied(self.values), lengths=self.lengths[rows], longest=self.longest
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Extension:
    """Tokens that are being appended to a cache, in all layers."""

    cache: KVCache
    positions: Tensor
    """(B, S) int64."""
    end: int
    """Slots that any of them may see."""
    visible: Tensor | None
    """(B, 1, S, end) which slots each new token sees. None: the cache was empty, and they are causal."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store keys and values (B, Hkv, S, d) of the new tokens; return what queries (B, H, S, d) read."""
        keys, values = self.cache.keys[layer], self.cache.values[layer]  # (B, capacity, Hkv, d)
        rows = torch.arange(len(keys), device=keys.device)[:, None]
        keys[rows, self.positions] = k.transpose(1, 2).to(keys.dtype)
        values[rows, self.positions] = v.transpose(1, 2).to(values.dtype)
        if self.visible is None:
            return torch_attention(q, k, v)
        seen, read = (x[:, : self.end].transpose(1, 2) for x in (keys, values))
        return torch_attention(q, seen, read, self.visible)
