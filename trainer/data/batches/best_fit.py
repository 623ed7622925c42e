"""Best-fit decreasing: pack pieces into few rows without splitting any (Ding et al. 2024, arXiv 2404.10830).

Pieces are placed from longest to shortest, each into the fullest row that has space for it. Pieces of the same length
are interchangeable, as are rows with the same free space, so they are placed in groups.

    capacity 9, pieces 5 5 4 3 1      row 0   5 5 5 5 5 3 3 3 1      row 1   5 5 5 5 5 4 4 4 4
"""

from collections import defaultdict

import numpy as np
from numpy.typing import NDArray


def best_fit_decreasing(lengths: NDArray[np.int64], capacity: int) -> NDArray[np.int64]:
    """Return the row of each piece, (n,), numbered from 0. The same lengths (n,), in [1, capacity], give the same rows.

    Takes the time of sorting n numbers plus at most n groups; a million pieces take less than a second.
    """
    rows_with: defaultdict[int, list[int]] = defaultdict(list)  # rows by their free space
    # Bit f of free_sizes is set if there are rows with free space f, so that the lowest bit is the fullest row.
    free_sizes = num_rows = 0
    placed: list[int] = []  # the rows of the pieces, longest first
    different, counts = np.unique(lengths, return_counts=True)
    for length, count in zip(reversed(different.tolist()), reversed(counts.tolist()), strict=True):
        while count:
            fitting = free_sizes >> length
            free = length + (fitting & -fitting).bit_length() - 1 if fitting else capacity
            # A row that takes a piece is still the fullest that fits, so it takes as many as it can.
            per_row = free // length
            needed = -(-count // per_row)
            if fitting:
                rows = rows_with[free][-needed:]
                del rows_with[free][-needed:]
                free_sizes ^= (not rows_with[free]) << free
            else:
                rows = list(range(num_rows, num_rows + needed))
                num_rows += needed
            num_placed = min(count, len(rows) * per_row)
            in_last = num_placed - (len(rows) - 1) * per_row
            placed += [row for row in rows for _ in range(per_row)][:num_placed]
            count -= num_placed
            for some, rest in ((rows[:-1], free - per_row * length), (rows[-1:], free - in_last * length)):
                if some and rest:
                    rows_with[rest] += some
                    free_sizes |= 1 << rest
    row_of = np.empty(len(lengths), dtype=np.int64)
    row_of[np.argsort(-lengths, kind="stable")] = placed
    return row_of
