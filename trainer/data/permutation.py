"""Seeded permutations that need no memory: any element is computed by itself.

Written in whole-number arithmetic on numpy arrays, not with numpy's random generators, whose streams may change between
versions: the order of the data is part of what a checkpoint resumes.
"""

from math import isqrt

import numpy as np
from numpy.typing import NDArray

U64 = NDArray[np.uint64]

# What a hash of a run's seed is for; two purposes must not share a stream.
FOR_BLOCK, FOR_ORDER, FOR_OFFSET, FOR_BLOCK_ROWS = 1, 2, 3, 4

_NUM_ROUNDS = 6
_INCREMENT = np.uint64(0x9E3779B97F4A7C15)
_FACTOR_1 = np.uint64(0xBF58476D1CE4E5B9)
_FACTOR_2 = np.uint64(0x94D049BB133111EB)


def hash64(*parts: int | U64) -> U64:
    """Return a 64-bit hash of whole numbers, in order; arrays are broadcast. At least one dimension.

    Source: the output function of splitmix64 (Steele et al. 2014), applied after each part.
    """
    state = np.array([_INCREMENT])
    for part in parts:
        value = np.array([part % 2**64], dtype=np.uint64) if isinstance(part, int) else part
        state = _mix(state ^ value)
    return state


def permute(index: U64, *, size: int, key: U64) -> U64:
    """Return where a pseudo-random permutation of [0, size) sends each index.

    Args:
        index: (n,) in [0, size).
        size: how many elements are permuted.
        key: (n,) or (1,), from hash64; each key has a permutation of its own.

    Returns:
        (n,) in [0, size).

    Source: a Feistel network on rows and columns (Black and Rogaway 2002, "generalized Feistel"), with cycle walking.
    """
    if size < 1:
        raise ValueError(f"size {size} has no permutation")
    key = np.broadcast_to(key, index.shape)
    # The network permutes a grid of num_rows * num_columns >= size cells. A cell beyond size is sent on until it is
    # below: the walk follows the cycle it is on, which leads back to the index itself in the end, so it does end.
    num_rows = isqrt(size - 1) + 1
    num_columns = -(-size // num_rows)
    result = _feistel(index, key, num_rows=num_rows, num_columns=num_columns)
    while (outside := result >= size).any():
        result[outside] = _feistel(result[outside], key[outside], num_rows=num_rows, num_columns=num_columns)
    return result


def _feistel(index: U64, key: U64, *, num_rows: int, num_columns: int) -> U64:
    row, column = np.divmod(index, np.uint64(num_columns))
    for number in range(_NUM_ROUNDS):  # each round moves one coordinate by a hash of the other: it can be undone
        if number % 2 == 0:
            row = (row + _round(key, number, column)) % np.uint64(num_rows)
        else:
            column = (column + _round(key, number, row)) % np.uint64(num_columns)
    return row * np.uint64(num_columns) + column


def _round(key: U64, number: int, coordinate: U64) -> U64:
    """Element (coordinate, number) of the splitmix64 stream that starts at key, below 2^32 so that sums do not wrap."""
    counter = coordinate * np.uint64(_NUM_ROUNDS) + np.uint64(number)
    return _mix(key + counter * _INCREMENT) >> np.uint64(32)


def _mix(state: U64) -> U64:
    state = state + _INCREMENT
    state = (state ^ (state >> np.uint64(30))) * _FACTOR_1
    state = (state ^ (state >> np.uint64(27))) * _FACTOR_2
    return state ^ (state >> np.uint64(31))
