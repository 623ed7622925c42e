"""KV cache whose rows have independent lengths.

A token's slot is its position, so a query at position p sees slots 0 .. p, or the last few of them in a layer with a
window. Slots beyond the end of a row are
overwritten before any query of that row sees them.

# slot     0  1  2  3  4      lengths
# row 0    a  b  c  d  .      4
# row 1    a  b  .  .  .      2

# L layers, B rows, S new tokens, T slots that they may see, H query heads, Hkv key and value heads, d head width.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.ops.attention import torch_attention
from trainer.ops.scored_attention import ScoreRule


@dataclass(slots=True, kw_only=True)
class KVCache:
    """Keys and values of the tokens so far.

    With latent attention a token's latent and rotated key are one entry in `keys`, and `values` have width 0.
    """

    layers: Sequence[int]
    """Numbers of the L layers: all of the model, or those of some stages."""
    keys: Tensor
    """(L, B, capacity, Hkv, d)."""
    values: Tensor
    lengths: Tensor
    """(B,) int64 tokens per row."""
    longest: int = 0
    """Upper bound of `lengths`, known without waiting for the device."""
    experts: list[Tensor] | None = None
    """(B, S, L, k) experts of the tokens of each call that appended some; None: they are not kept."""

    @property
    def capacity(self) -> int:
        """Maximum tokens per row."""
        return self.keys.shape[2]

    def extension(self, num_tokens: int, windows: Collection[int | None]) -> "Extension":
        """Return the slots of `num_tokens` more tokens per row; afterwards `grow` counts those that are real.

        `windows` are those of the layers: keys that a query sees, itself included; None: all.
        """
        end = self.longest + num_tokens
        assert end <= self.capacity, f"{end} tokens in a cache for {self.capacity}"
        columns = torch.arange(num_tokens, device=self.lengths.device)
        positions = self.lengths[:, None] + columns  # (B, S)
        slots = torch.arange(end, device=positions.device)
        before = positions[:, None, :, None] - slots  # (B, 1, S, T), from a slot to a query
        visible: dict[int | None, Tensor | None] = {}
        for window in windows:
            if self.longest == 0 and (window is None or window >= num_tokens):
                visible[window] = None
            else:
                visible[window] = before >= 0 if window is None else (before >= 0) & (before < window)
        return Extension(cache=self, positions=positions, end=end, visible=visible)

    def grow(self, num_new: Tensor, at_most: int) -> None:
        """Extend the rows by num_new (B,) tokens, each at most `at_most`."""
        self.lengths = self.lengths + num_new
        self.longest += at_most

    def shorten(self, num_tokens: int) -> None:
        """Keep only the first `num_tokens` of each row, which has at least as many."""
        self.lengths = torch.full_like(self.lengths, num_tokens)
        self.longest = num_tokens

    @torch.no_grad()
    def select(self, rows: Tensor, *, capacity: int | None = None) -> "KVCache":
        """Return a cache of these rows, which may repeat, with the given capacity."""
        capacity, end = self.capacity if capacity is None else capacity, self.longest
        assert capacity >= end, f"{end} tokens in a cache for {capacity}"

        def copied(x: Tensor) -> Tensor:
            chosen = x.new_empty(x.shape[0], len(rows), capacity, *x.shape[3:])
            torch.index_select(x[:, :, :end], 1, rows, out=chosen[:, :, :end])
            chosen[:, :, end:] = 0  # hidden slots are multiplied by 0, so they must be finite
            return chosen

        return KVCache(
            layers=self.layers,
            keys=copied(self.keys),
            values=copied(self.values),
            lengths=self.lengths[rows],
            longest=self.longest,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Extension:
    """Slots of tokens that are being appended to a cache, for all layers."""

    cache: KVCache
    positions: Tensor
    """(B, S) int64."""
    end: int
    """Number of leading slots visible to any of the new tokens."""
    visible: Mapping[int | None, Tensor | None]
    """(B, 1, S, T) slots visible to each new token, by window. None: the cache was empty, so attention is causal."""

    def layer(self, layer: int, window: int | None) -> "LayerCache":
        """Return the slots of one layer, which has this window."""
        return LayerCache(extension=self, layer=self.cache.layers.index(layer), visible=self.visible[window])


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCache:
    """Slots of one layer's tokens that are being appended to a cache."""

    extension: Extension
    layer: int
    """Index among the layers of the cache."""
    visible: Tensor | None
    """(B, 1, S, T) slots visible to each new token; None: attention is causal among them."""

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values (B, Hkv, S, d) of new tokens; return those of all slots (B, Hkv, T, d) they may see."""
        positions, cache = self.extension.positions, self.extension.cache
        keys, values = cache.keys[self.layer], cache.values[self.layer]  # (B, capacity, Hkv, d)
        rows = torch.arange(len(keys), device=keys.device)[:, None]
        keys[rows, positions] = k.transpose(1, 2).to(keys.dtype)
        values[rows, positions] = v.transpose(1, 2).to(values.dtype)
        return keys[:, : self.extension.end].transpose(1, 2), values[:, : self.extension.end].transpose(1, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, rule: ScoreRule | None = None) -> Tensor:
        """Store keys and values (B, Hkv, S, d) of new tokens; return the output of queries (B, H, S, d)."""
        seen, read = self.append(k, v)
        if self.visible is None:
            return torch_attention(q, k, v, None, rule)
        return torch_attention(q, seen, read, self.visible, rule)
