"""The seam between a run's order and a domain's text: visits of a domain become rows.

The mixture says which domain a slot is of and how often that domain was visited before it; `DomainRows` says what such
a visit reads. Whatever it is made of, a visit is the same row on any rank, after any restart.

# n rows, S tokens in a row.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.data.permutation import FOR_ORDER, hash64, permute


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SequenceRows:
    """Some rows of one domain; every field is (n, S)."""

    tokens: NDArray[np.int64]
    targets: NDArray[np.int64]
    """The token after each one."""
    is_learned: NDArray[np.bool_]
    """The target is to be predicted: it is no part of a prompt."""
    is_real: NDArray[np.bool_]
    """False is padding; the other fields mean nothing there."""
    document: NDArray[np.int64]
    """Running number of the document inside the domain."""


class DomainRows(ABC):
    """The rows of one domain in the order of a run: visit 0, 1, 2 and so on, epoch after epoch."""

    @property
    @abstractmethod
    def num_rows(self) -> int | None:
        """Rows of an epoch; None where that is not known."""

    @abstractmethod
    def read(self, visits: NDArray[np.int64]) -> SequenceRows:
        """Return the rows of visits (n,), in any order and number, whatever was read before."""

    def epochs(self, num_visits: int) -> float | None:
        """Return how often the domain is read by its first visits; None where that is not known."""
        return None if self.num_rows is None else num_visits / self.num_rows


def epoch_order(
    visits: NDArray[np.int64], *, num_rows: int, seed: int, domain: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the epoch of each visit (n,), and which of the domain's rows it reads.

    Each epoch has every row once, in an order of its own: a permutation keyed by (seed, domain, epoch).
    """
    epoch, index = np.divmod(visits, num_rows)
    key = hash64(seed, FOR_ORDER, domain, epoch.astype(np.uint64))
    return epoch, permute(index.astype(np.uint64), size=num_rows, key=key).astype(np.int64)
