"""Domain of row number n of a run: a pure function of the shares, the seed and n.

Rows are numbered from 0 over the whole run; such a number is called a slot. A slot is the same visit of the same domain
on any rank and after any restart, so the position of a run in its data is one integer.

    slots     0 ............ 4095 | 4096 ........ 8191 | ...   blocks; each domain has its exact quota in every block,
    domain    b a a c b a a a ... | a b a a c ...            shuffled by a permutation of the block
    visit     0 0 1 0 1 2 3 4 ... |                          how often the domain was visited before

`DomainRows` (batches/row_order.py) maps visits to rows.

# D domains, n slots.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trainer.data.permutation import FOR_BLOCK, hash64, permute_index
from trainer.errors import DataError

SMALLEST_BLOCK, LARGEST_BLOCK = 1 << 12, 1 << 22  # slots
_MIN_DOMAIN_SLOTS = 16
"""Least slots of a domain in a block, so that rounding changes its share by less than a sixteenth."""


def domain_shares(
    *,
    by: Literal["weight", "tokens"],
    temperature: float,
    sources: Sequence[int],
    weights: Sequence[float],
    num_tokens: Sequence[int],
) -> tuple[float, ...]:
    """Return the share (D,) of each domain in the rows; they sum to 1.

    `weight` splits the weight of a source evenly over its domains; `tokens` makes shares proportional to
    weight * tokens^(1 / temperature), more even above 1. `sources` (D,) are the domains' indices into `weights`, and
    `num_tokens` (D,) their training tokens.

    Source: Raffel et al. 2020 (arXiv 1910.10683), section 3.5.2, for the temperature.
    """
    if by == "weight":
        in_source, total = np.bincount(sources), sum(weights)
        return tuple(weights[source] / int(in_source[source]) / total for source in sources)
    # Divided by the maximum: at a low temperature, a power of a large number overflows.
    most, power = max(num_tokens), 1 / temperature
    amounts = [weights[source] * (tokens / most) ** power for source, tokens in zip(sources, num_tokens, strict=True)]
    total = sum(amounts)
    return tuple(amount / total for amount in amounts)


class Mixture:
    """Order in which domains are visited. Stateless, except for a cache of the last block."""

    def __init__(self, *, domains: Sequence[str], shares: Sequence[float], seed: int) -> None:
        """Compute the quotas of D domains, whose shares need not sum to 1; raise DataError if one is too small."""
        if not len(domains) == len(shares) > 0:
            raise ValueError(f"{len(domains)} domains, {len(shares)} shares; one of each")
        self._seed = seed
        self.quotas = _quotas(domains, shares)
        """(D,) slots of each domain in a block."""
        self.block_slots = int(self.quotas.sum())
        """Slots of a block."""
        # Domain of each slot of an unshuffled block, and the number of the slot within its domain:
        # a a a a b b c and 0 1 2 3 0 1 0.
        self._unshuffled = np.repeat(np.arange(len(domains), dtype=np.int32), self.quotas)
        before = np.cumsum(self.quotas) - self.quotas
        self._number = (np.arange(self.block_slots) - before[self._unshuffled]).astype(np.int32)
        self._last: tuple[int, NDArray[np.int32], NDArray[np.int32]] | None = None

    def locate(self, slots: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return domain and visit of each slot, both (n,)."""
        slots = np.asarray(slots, dtype=np.int64)
        if slots.size and slots.min() < 0:
            raise ValueError(f"slot {slots.min()} is negative; slots are numbered from 0")
        if len(self.quotas) == 1:
            return np.zeros_like(slots), slots
        domain, visit = np.empty_like(slots), np.empty_like(slots)
        blocks, places = np.divmod(slots, self.block_slots)
        for block in np.unique(blocks).tolist():
            here = blocks == block
            domains, numbers = self._block(block)
            domain[here] = domains[places[here]]
            visit[here] = block * self.quotas[domain[here]] + numbers[places[here]]
        return domain, visit

    def num_visits(self, num_slots: int) -> NDArray[np.int64]:
        """Return (D,): number of visits of each domain in the first slots of a run."""
        block, place = divmod(num_slots, self.block_slots)
        domains, _ = self._block(block)
        return block * self.quotas + np.bincount(domains[:place], minlength=len(self.quotas))

    def _block(self, block: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Return the domain of each slot and the slot's number within that domain, both (block_slots,)."""
        if self._last is None or self._last[0] != block:
            places = np.arange(self.block_slots, dtype=np.uint64)
            shuffled = permute_index(places, size=self.block_slots, key=hash64(self._seed, FOR_BLOCK, block))
            domains = self._unshuffled[shuffled]
            by_domain = np.argsort(domains, kind="stable")  # slots of domain 0 in order, then those of 1, ...
            numbers = np.empty_like(self._number)
            numbers[by_domain] = self._number
            self._last = block, domains, numbers
        return self._last[1:]


def _quotas(domains: Sequence[str], shares: Sequence[float]) -> NDArray[np.int64]:
    """Return the slots of each domain in a block.

    A block has 4096 slots, or 16 for each domain if that is more. If that would leave a domain without a slot, it is
    enlarged until the smallest domain has 16.
    """
    share = np.asarray(shares, dtype=np.float64)
    if not (np.isfinite(share).all() and (share >= 0).all() and share.sum() > 0):
        raise ValueError(f"shares {list(shares)} are not all positive")
    share = share / share.sum()
    num_slots = max(SMALLEST_BLOCK, 1 << (_MIN_DOMAIN_SLOTS * len(share) - 1).bit_length())
    quotas = _rounded(share * num_slots)
    if quotas.min() == 0:
        while num_slots < LARGEST_BLOCK and share.min() * num_slots < _MIN_DOMAIN_SLOTS:
            num_slots *= 2
        quotas = _rounded(share * num_slots)
    if quotas.min() == 0:
        smallest = int(quotas.argmin())
        raise DataError(
            f"data.sources: domain {domains[smallest]} has {share[smallest]:.2g} of the rows and would never be drawn; "
            f"the smallest possible share is 1/{LARGEST_BLOCK} ({1 / LARGEST_BLOCK:.2g}); raise its weight or "
            "data.mixture.temperature, or leave it out"
        )
    return quotas


def _rounded(exact: NDArray[np.float64]) -> NDArray[np.int64]:
    """Round to whole numbers with the same sum, by largest remainder."""
    quotas = np.floor(exact).astype(np.int64)
    by_remainder = np.argsort(quotas - exact, kind="stable")  # equal remainders: the first domain
    quotas[by_remainder[: round(exact.sum()) - quotas.sum()]] += 1
    return quotas
