"""Interface between the order of a run and the text of a domain: visits of a domain become rows.

The mixture maps a slot to a domain and to the number of earlier visits of that domain; `DomainRows` maps such a visit
to a row. A visit is the same row on any rank and after any restart.

# n rows, S tokens in a row.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.data.permutation import FOR_ORDER, hash64, permute_index


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SequenceRows:
    """Rows of one domain; every field is (n, S), but the experts."""

    tokens: NDArray[np.int64]
    targets: NDArray[np.int64]
    loss_mask: NDArray[np.bool_] | NDArray[np.float64]
    """The target is not part of a prompt; or its weight in the loss."""
    is_real: NDArray[np.bool_]
    """False is padding, where the other fields are undefined."""
    document: NDArray[np.int64]
    """Number of the document in the domain."""
    experts: NDArray[np.int64] | None = None
    """(n, S, L, k) experts to replay; None: the routers choose."""


class DomainRows(ABC):
    """Rows of one domain in the order of a run: visits 0, 1, 2 and so on, epoch after epoch."""

    num_rows: int
    """Rows of an epoch; 0 if unknown."""

    @abstractmethod
    def read(self, visits: NDArray[np.int64]) -> SequenceRows:
        """Return the rows of visits (n,), in any order; independent of earlier calls."""

    def epochs(self, num_visits: int) -> float:
        """Return the epochs that the first `num_visits` visits cover."""
        return num_visits / self.num_rows


def epoch_order(
    visits: NDArray[np.int64], *, num_rows: int, seed: int, domain: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the epoch and the row number of each visit, both (n,).

    Each epoch has every row once, permuted by a key of (seed, domain, epoch).
    """
    epoch, index = np.divmod(visits, num_rows)
    key = hash64(seed, FOR_ORDER, domain, epoch.astype(np.uint64))
    return epoch, permute_index(index.astype(np.uint64), size=num_rows, key=key).astype(np.int64)
