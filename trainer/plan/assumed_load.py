"""Assumed choices of experts: how many of a rank's assignments each expert gets, spread over its tokens.

# T tokens, k experts per token, A = T * k assignments, E experts, G expert-parallel ranks.
"""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from trainer.distributed.rank_layout import even_slices


class AssumedLoad:
    """Shares of the experts of all assignments, the same in every layer and for the tokens of every rank.

    No expert gets more than one assignment of a token: a share above 1 / k is spread over the others.
    """

    def __init__(self, shares: Sequence[float], top_k: int) -> None:
        """Take (E,) shares, of any sum, and the experts per token."""
        self.num_experts, self.top_k = len(shares), max(1, min(top_k, len(shares)))
        self.shares = _limited(torch.tensor(shares, dtype=torch.float64), 1 / self.top_k)
        self._choice, self._order = cache(self._choose), cache(self._sort)

    def choice(self, num_tokens: int) -> Tensor:
        """Return (T, k) int64 different experts of each token.

        #  T 4, k 2, rows of the experts 4 3 1     by slot, then token   0 0 0 0 | 1 1 1 2
        """
        return self._choice(num_tokens)

    def order(self, num_tokens: int) -> Tensor:
        """Return (T, E) int64 all experts of each token: first those of its choice, then the others."""
        return self._order(num_tokens)

    def rows_per_expert(self, num_tokens: int) -> Tensor:
        """Return (E,) int64 assignments of so many tokens to each expert."""
        ends = (self.shares.cumsum(0) * num_tokens * self.top_k).round().long()
        ends[-1] = num_tokens * self.top_k
        return ends.diff(prepend=ends.new_zeros(1)).clamp(max=num_tokens)

    def busiest_rank(self, ep_size: int) -> int:
        """Return the expert-parallel rank whose experts together have the largest share."""
        return max(range(ep_size), key=lambda rank: self.of_rank(rank, ep_size))

    def of_rank(self, rank: int, ep_size: int) -> float:
        """Return the share of the experts of an expert-parallel rank."""
        first, end = even_slices(self.num_experts, ep_size)[rank]
        return float(self.shares[first:end].sum())

    def _choose(self, num_tokens: int) -> Tensor:
        slots = torch.arange(num_tokens * self.top_k)
        ends = self.rows_per_expert(num_tokens).cumsum(0)
        expert = torch.searchsorted(ends, slots, right=True).clamp(max=self.num_experts - 1)
        return expert.view(self.top_k, num_tokens).T.contiguous()

    def _sort(self, num_tokens: int) -> Tensor:
        rank = torch.zeros(num_tokens, self.num_experts)
        best = torch.arange(self.top_k, 0, -1, dtype=rank.dtype).expand(num_tokens, -1)
        return rank.scatter_(1, self.choice(num_tokens), best).sort(dim=1, descending=True, stable=True).indices


def skewed_shares(num_experts: int, ep_size: int, imbalance: float) -> list[float]:
    """Return (E,) shares of which the first rank's experts have `imbalance` times an even share, the others the rest.

    With one rank, its first expert has so much more than the others.
    """
    first, end = even_slices(num_experts, ep_size if ep_size > 1 else num_experts)[0]
    busy, rest = end - first, num_experts - (end - first)
    each = min(imbalance / num_experts, 1 / busy)
    others = (1 - busy * each) / rest if rest else 0.0
    return [each] * busy + [others] * rest


def _limited(shares: Tensor, most: float) -> Tensor:
    """Return shares that sum to 1, none above `most`: what is too much is spread over the others in proportion."""
    shares = shares / shares.sum()
    for _ in shares:
        excess = (shares - most).clamp(min=0).sum()
        if excess <= 1e-12:
            break
        shares = shares.clamp(max=most)
        room = most - shares
        shares = shares + excess * room / room.sum()
    return shares
