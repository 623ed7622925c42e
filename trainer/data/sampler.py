"""Which text is row number n of a run: a pure function of the seed and n.

Rows are numbered from 0 over the whole run; a number is called a slot. Whatever asks for a slot, on any rank, after any
restart, gets the same window of text, so the position of a run in its data is one integer.

    slots     0 ............ 4095 | 4096 ........ 8191 | ...   blocks; each domain has its exact quota in every block,
    domain    b a a c b a a a ... | a b a a c ...            shuffled by a permutation of the block
    visit     0 0 1 0 1 2 3 4 ... |                          how often the domain was visited before
    epoch, n  divmod(visit, windows of the domain)           the epoch's own permutation gives the window

# N tokens of a domain's training text, S tokens in a row.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainer.data.permutation import hash64, permute
from trainer.errors import DataError

BLOCK_SLOTS = 4096
"""Slots in which every domain is visited exactly as often as its weight says."""

# What a hash of the seed is for; two purposes must not share a stream.
_FOR_BLOCK, _FOR_WINDOW, _FOR_OFFSET = 1, 2, 3


class SampleLocation(NamedTuple):
    """Where the rows of some slots are; all (n,) int64."""

    domain: NDArray[np.int64]
    """Index of the domain."""
    start: NDArray[np.int64]
    """Position of the row's first token in the domain's training text; the row reads S + 1 tokens from there."""
    epoch: NDArray[np.int64]
    """How often the domain was read in whole before."""


class Sampler:
    """Draws windows of text from domains by weight. Holds no state but its options.

    Windows are S + 1 tokens (S inputs, each with the token after it) at a stride of S, so that in an epoch no token is
    predicted twice. An epoch starts at an offset of its own, so that windows are cut elsewhere every time. In exchange
    up to 2 S - 1 tokens at the ends of a domain are left out of an epoch.
    """

    def __init__(
        self, *, domains: Sequence[str], num_tokens: Sequence[int], weights: Sequence[float], seq_len: int, seed: int
    ) -> None:
        """Start a sampler.

        Args:
            domains: names, for messages.
            num_tokens: N of each domain.
            weights: share of each domain in the rows; need not sum to 1.
            seq_len: S.
            seed: the order is a function of it.

        Raises:
            DataError: if a domain is shorter than one window or its weight too small to be drawn.
        """
        if not len(domains) == len(num_tokens) == len(weights) > 0:
            raise ValueError(f"{len(domains)} domains, {len(num_tokens)} lengths, {len(weights)} weights; one of each")
        if seq_len < 1:
            raise ValueError(f"seq_len is {seq_len}; a row has at least one token")
        for name, length in zip(domains, num_tokens, strict=True):
            if length < seq_len + 1:
                raise DataError(
                    f"data.sources: domain {name} has {length} training tokens; one window of model.seq_len {seq_len} "
                    f"needs {seq_len + 1}; give it more text or use model.seq_len: {max(length - 1, 1)} or less"
                )
        self._seq_len = seq_len
        self._seed = seed
        # Every offset in [0, S) leaves room for this many windows. A text of less than two windows has one, and fewer
        # offsets. Either way the number does not depend on the epoch.
        self._num_windows = [max((length - seq_len) // seq_len, 1) for length in num_tokens]
        self._num_offsets = [
            min(length - windows * seq_len, seq_len)
            for length, windows in zip(num_tokens, self._num_windows, strict=True)
        ]
        self._quotas = _quotas(domains, weights)
        # Domain of each place of an unshuffled block: a a a a b b c.
        self._unshuffled = np.repeat(np.arange(len(domains)), self._quotas)  # (BLOCK_SLOTS,)

    @property
    def quotas(self) -> tuple[int, ...]:
        """Slots of each domain in every block of BLOCK_SLOTS."""
        return tuple(self._quotas.tolist())

    @property
    def num_windows(self) -> tuple[int, ...]:
        """Windows of each domain in an epoch."""
        return tuple(self._num_windows)

    def locate(self, slots: NDArray[np.int64]) -> SampleLocation:
        """Return where the rows of `slots` (n,) are, in any order and number, whatever was asked before."""
        slots = np.asarray(slots, dtype=np.int64)
        if slots.size and slots.min() < 0:
            raise ValueError(f"slot {slots.min()} is negative; slots are numbered from 0")
        domain, visit = self._visits(slots)
        start, epoch = np.empty_like(slots), np.empty_like(slots)
        for d in np.unique(domain).tolist():
            here = domain == d
            start[here], epoch[here] = self._windows(d, visit[here])
        return SampleLocation(domain, start, epoch)

    def _visits(self, slots: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the domain of each slot, and how often that domain was visited before it."""
        if len(self._quotas) == 1:
            return np.zeros_like(slots), slots
        domain, visit = np.empty_like(slots), np.empty_like(slots)
        blocks, places = np.divmod(slots, BLOCK_SLOTS)
        for block in np.unique(blocks).tolist():
            here = blocks == block
            domains, ranks = self._block(block)
            domain[here] = domains[places[here]]
            visit[here] = block * self._quotas[domain[here]] + ranks[places[here]]
        return domain, visit

    def _block(self, block: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return each slot's domain and its rank among the block's slots of that domain, both (BLOCK_SLOTS,)."""
        places = np.arange(BLOCK_SLOTS, dtype=np.uint64)
        shuffled = permute(places, size=BLOCK_SLOTS, key=hash64(self._seed, _FOR_BLOCK, block))
        domains = self._unshuffled[shuffled]
        by_domain = np.argsort(domains, kind="stable")  # slots of domain 0 in order, then those of 1, ...
        ranks = np.empty(BLOCK_SLOTS, dtype=np.int64)
        ranks[by_domain] = np.concatenate([np.arange(quota) for quota in self._quotas])
        return domains, ranks

    def _windows(self, domain: int, visit: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the first token and the epoch of a domain's visits."""
        epoch, index = np.divmod(visit, self._num_windows[domain])
        epoch_key = epoch.astype(np.uint64)
        key = hash64(self._seed, _FOR_WINDOW, domain, epoch_key)
        window = permute(index.astype(np.uint64), size=self._num_windows[domain], key=key)
        offset = hash64(self._seed, _FOR_OFFSET, domain, epoch_key) % np.uint64(self._num_offsets[domain])
        return offset.astype(np.int64) + window.astype(np.int64) * self._seq_len, epoch


def _quotas(domains: Sequence[str], weights: Sequence[float]) -> NDArray[np.int64]:
    """Divide a block among the domains by weight: rounded down, then one more for the largest remainders."""
    shares = np.asarray(weights, dtype=np.float64)
    if not (np.isfinite(shares).all() and (shares > 0).all()):
        raise ValueError(f"weights {list(weights)} are not all positive")
    exact = shares / shares.sum() * BLOCK_SLOTS
    quotas = np.floor(exact).astype(np.int64)
    by_remainder = np.argsort(quotas - exact, kind="stable")  # equal remainders: the first domain
    quotas[by_remainder[: BLOCK_SLOTS - quotas.sum()]] += 1
    for name, share, quota in zip(domains, shares / shares.sum(), quotas, strict=True):
        if quota == 0:
            raise DataError(
                f"data.sources: domain {name} has {share:.2g} of the weight and would never be drawn; the smallest "
                f"share that is drawn is 1/{BLOCK_SLOTS} (0.00025); raise its weight or leave it out"
            )
    return quotas
