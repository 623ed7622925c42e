"""Best-fit decreasing: pieces into few rows without cutting any (Ding et al. 2024, arXiv 2404.10830).

The longest pieces come first, and each goes into the fullest row that still has room for it. Pieces of one length are
alike, and so are rows with the same room, so that they are placed a group at a time.

    room 9, pieces 5 5 4 3 1      row 0   5 5 5 5 5 3 3 3 1      row 1   5 5 5 5 5 4 4 4 4
"""

from collections import defaultdict

import numpy as np
from numpy.typing import NDArray


def best_fit_decreasing(lengths: NDArray[np.int64], room: int) -> NDArray[np.int64]:
    """Return (n,) the row of each piece; rows are numbered from 0. The same lengths give the same rows.

    Takes the time of sorting n numbers, and of at most n groups: a million pieces take less than a second.

    Args:
        lengths: (n,) in [1, room].
        room: of an empty row; the pieces of a row are not longer together.
    """
    rows_with: defaultdict[int, list[int]] = defaultdict(list)  # rows by the room that they have left
    rooms = num_rows = 0  # rooms: bit r is set if there are rows with room r, so the tightest one is the lowest bit
    placed: list[int] = []  # the rows of the pieces, longest first
    different, counts = np.unique(lengths, return_counts=True)
    for length, count in zip(reversed(different.tolist()), reversed(counts.tolist()), strict=True):
        while count:
            fitting = rooms >> length
            left = length + (fitting & -fitting).bit_length() - 1 if fitting else room
            # If a row has room for another piece of this length, no row is tighter: it takes as many as it can.
            per_row = left // length
            needed = -(-count // per_row)
            if fitting:
                rows = rows_with[left][-needed:]
                del rows_with[left][-needed:]
                rooms ^= (not rows_with[left]) << left
            else:
                rows = list(range(num_rows, num_rows + needed))
                num_rows += needed
            num_placed = min(count, len(rows) * per_row)
            in_last = num_placed - (len(rows) - 1) * per_row
            placed += [row for row in rows for _ in range(per_row)][:num_placed]
            count -= num_placed
            for some, rest in ((rows[:-1], left - per_row * length), (rows[-1:], left - in_last * length)):
                if some and rest:
                    rows_with[rest] += some
                    rooms |= 1 << rest
    row_of = np.empty(len(lengths), dtype=np.int64)
    row_of[np.argsort(-lengths, kind="stable")] = placed
    return row_of
