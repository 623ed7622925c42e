"""Attention to rows that several ranks share: heads are exchanged for positions, and back (arXiv 2309.14509).

    rank   before: all heads of its part of each row      between: some heads, whole rows     after: as before
    0      q k v (B, H, S, d)                  ->         (B, H/n, n S, d) -> kernel     ->   (B, H, S, v)

The kernel is the one that a rank alone would use, with the mask of the whole rows, so that documents, windows, capped
scores and sinks are its business. Heads need not divide by the ranks. Ranks whose query heads share a key head each
get it, and its gradient comes back from each with the share of their queries.

# B rows, S positions of a rank, n ranks, H query heads, Hkv key and value heads, m heads of a rank, d width of a head.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from trainer.distributed.collectives import AllToAll, Group
from trainer.distributed.rank_layout import even_slices
from trainer.ops.attention import CausalAttention
from trainer.ops.attention_mask import PreparedMask, RowMask
from trainer.ops.scored_attention import ScoreRule
from trainer.ops.zigzag import in_row_order, part_of


class UlyssesAttention:
    """Kernel of attention around another one, to which it gives whole rows of some heads."""

    def __init__(self, group: Group, kernel: CausalAttention) -> None:
        self._group, self._kernel = group, kernel

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, mask: PreparedMask | None = None, rule: ScoreRule | None = None
    ) -> Tensor:
        """Attend; a batch of whole rows, whose mask is no `RowMask`, is the kernel's alone."""
        if not isinstance(mask, RowMask):
            return self._kernel(q, k, v, mask, rule)
        slices = even_slices(q.shape[1], self._group.size)
        shared = [key_heads(first, last, q.shape[1] // k.shape[1]) for first, last in slices]
        q, k, v = self._rows_of_heads([(q, [list(range(*each)) for each in slices]), (k, shared), (v, shared)])
        if rule is not None and rule.sinks is not None:
            first, last = slices[self._group.index]
            rule = replace(rule, sinks=rule.sinks[first:last])
        return self._parts_of_rows(self._kernel(q, k, v, mask.whole, rule), [last - first for first, last in slices])

    def _rows_of_heads(self, tensors: Sequence[tuple[Tensor, Sequence[Sequence[int]]]]) -> list[Tensor]:
        """Return whole rows (B, m, n S, d) of this rank's heads, given parts (B, H, S, d) and the heads of each rank.

        All are under way before the first is waited for.
        """
        started = list[AllToAll]()
        for x, heads in tensors:
            flat = [head for of_rank in heads for head in of_rank]
            rows = x.transpose(0, 1)  # (H, B, S, d)
            if flat != list(range(len(rows))):
                rows = rows[torch.tensor(flat, device=x.device)]
            mine = len(heads[self._group.index])
            started.append(self._group.start_all_to_all(rows, [len(h) for h in heads], [mine] * self._group.size))
        whole = []
        for exchange in started:
            parts = exchange.wait().unflatten(0, (self._group.size, -1))  # (n, m, B, S, d)
            whole.append(in_row_order(parts.unbind(), dim=2).transpose(0, 1))
        return whole

    def _parts_of_rows(self, y: Tensor, num_heads: Sequence[int]) -> Tensor:
        """Return this rank's part (B, H, S, v) of all heads, from whole rows (B, m, n S, v) of its own."""
        n, rows = self._group.size, y.transpose(0, 1)
        parts = torch.cat([part_of(rows, index, n, dim=2) for index in range(n)])  # (n m, B, S, v)
        return self._group.all_to_all(parts, [len(rows)] * n, num_heads).transpose(0, 1)


def key_heads(first: int, last: int, group_size: int) -> list[int]:
    """Return the key heads of query heads first .. last - 1, of which `group_size` share one.

    Each is there once if equally many of these queries share it, as kernels expect; else once for each query.
    """
    of_queries = [head // group_size for head in range(first, last)]
    once = list(dict.fromkeys(of_queries))
    return once if len({of_queries.count(head) for head in once}) == 1 else of_queries
