"""Which keys a query sees, and the forms in which kernels of attention take that.

One value is made for each micro-batch and shared by all layers. A layer's kernel takes it as a dense mask, which costs
S^2 bits and is all that the CPU's kernels and torch's own understand, or as flex_attention's lists of blocks, from
which whole blocks that nobody sees are left out and no score is ever stored.

# B rows, S tokens in a row, n blocks of queries, and of keys, in a row.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

MaskForm = Literal["dense", "blocks", "rule"]


_BLOCK = 128
"""Queries, and keys, of a block: what flex_attention's kernels expect."""


@dataclass(frozen=True, slots=True)
class RowMask:
    """The mask of whole rows, of which a batch has a part each."""

    whole: "Tensor | BlockMask | AttentionMask | None"
    """None: all keys that are not later."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionMask:
    """Keys visible to each query: those not later, of its document, and within the window."""

    document: Tensor
    """(B, S) document of each token, or (1, S) if it is the same in every row."""
    window: int | None = None
    """Maximum keys that a query sees, itself and those just before it; None: any number."""

    def prepared(self, form: MaskForm) -> "Tensor | BlockMask | AttentionMask":
        """Return the mask as a kernel takes it; `rule`: as it is."""
        match form:
            case "dense":
                return self.dense()
            case "blocks":
                return self.blocks()
            case "rule":
                return self

    def dense(self) -> Tensor:
        """Return (B or 1, 1, S, S) bool.

        #  document  0 0 1      visible  x . .
        #                                x x .
        #                                . . x
        """
        seen = (self.document[:, :, None] == self.document[:, None, :]).tril()
        if self.window is not None:
            seen = seen.triu(1 - self.window)
        return seen[:, None]

    def blocks(self) -> BlockMask:
        """Return a block mask, made from the documents of blocks without an (S, S) mask.

        A block of queries meets one of keys if their ranges of documents overlap, which they do wherever anything is
        visible, and meets it without a mask if both are of one and the same document.
        """
        B, S = self.document.shape
        n = -(-S // _BLOCK)
        position = torch.arange(n * _BLOCK, device=self.document.device).clamp(max=S - 1)
        low, high = self.document[:, position].view(B, n, _BLOCK).aminmax(dim=-1)  # (B, n)
        block = torch.arange(n, device=self.document.device)
        ahead = (block[:, None] - block) * _BLOCK  # (n, n), from the first key of a block to the first query
        some = (ahead >= 0) & (low[:, :, None] <= high[:, None]) & (low[:, None] <= high[:, :, None])
        whole = (ahead > 0) & (low[:, :, None] == high[:, None]) & (low[:, None] == high[:, :, None])
        if self.window is not None:
            some, whole = some & (ahead - _BLOCK + 1 < self.window), whole & (ahead + _BLOCK - 1 < self.window)
        sees = _visible(self.document, self.window)
        return BlockMask.from_kv_blocks(
            *_listed(some & ~whole), *_listed(whole), BLOCK_SIZE=_BLOCK, mask_mod=sees, seq_lengths=(S, S)
        )


PreparedMask = Tensor | BlockMask | AttentionMask | RowMask
"""(B or 1, 1, S, S) bool, causal, or the same as blocks or a rule; None in its place: all keys that are not later."""


def _visible(document: Tensor, window: int | None) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Return what says whether a query sees a key, which flex_attention compiles into its kernel."""

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        at = row if len(document) > 1 else torch.zeros_like(row)
        seen = (query >= key) & (document[at, query] == document[at, key])
        return seen if window is None else seen & (query - key < window)

    return sees


def _listed(meets: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many blocks of keys each block of queries meets (B, 1, n), and which (B, 1, n, n), those first."""
    meets = meets[:, None].int()
    return meets.sum(-1, dtype=torch.int32), torch.argsort(meets, dim=-1, descending=True, stable=True).int()
