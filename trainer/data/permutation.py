"""Seeded permutations that need no memory: each element is computed on its own.

They use integer arithmetic instead of numpy's random generators, whose streams may change between versions: a resumed
run relies on the order of the data.
"""

from math import isqrt

import numpy as np
from numpy.typing import NDArray

U64 = NDArray[np.uint64]

# Purposes of a hash of the run's seed; each has its own random stream.
FOR_BLOCK, FOR_ORDER, FOR_OFFSET, FOR_BLOCK_ROWS = 1, 2, 3, 4

_NUM_ROUNDS = 6
_INCREMENT = np.uint64(0x9E3779B97F4A7C15)
_FACTOR_1 = np.uint64(0xBF58476D1CE4E5B9)
_FACTOR_2 = np.uint64(0x94D049BB133111EB)


def hash64(*parts: int | U64) -> U64:
    """Return a 64-bit hash of integers; arrays are broadcast. The result has at least one dimension.

    Source: the output function of splitmix64 (Steele et al. 2014), applied after each part.
    """
    state = np.array([_INCREMENT])
    for part in parts:
        value = np.array([part % 2**64], dtype=np.uint64) if isinstance(part, int) else part
        state = _mix(state ^ value)
    return state


def permute_index(index: U64, *, size: int, key: U64) -> U64:
    """Apply a pseudo-random permutation of [0, size) to each index (n,); `key`, (n,) or (1,) of hash64, selects it.

    Source: a Feistel network on rows and columns (Black and Rogaway 2002, "generalized Feistel"), with cycle walking.
    """
    if size < 1:
        raise ValueError(f"size {size} has no permutation")
    key = np.broadcast_to(key, index.shape)
    # The network permutes a grid of num_rows * num_columns >= size cells. It is applied again to results beyond size;
    # that walk terminates, because its cycle leads back to the index itself.
    num_rows = isqrt(size - 1) + 1
    num_columns = -(-size // num_rows)
    result = _feistel(index, key, num_rows=num_rows, num_columns=num_columns)
    while (outside := result >= size).any():
        result[outside] = _feistel(result[outside], key[outside], num_rows=num_rows, num_columns=num_columns)
    return result


def _feistel(index: U64, key: U64, *, num_rows: int, num_columns: int) -> U64:
    row, column = np.divmod(index, np.uint64(num_columns))
    for number in range(_NUM_ROUNDS):  # invertible: each round shifts one coordinate by a hash of the other
        if number % 2 == 0:
            row = (row + _round(key, number, column)) % np.uint64(num_rows)
        else:
            column = (column + _round(key, number, row)) % np.uint64(num_columns)
    return row * np.uint64(num_columns) + column


def _round(key: U64, number: int, coordinate: U64) -> U64:
    """Return element (coordinate, number) of the splitmix64 stream of `key`, below 2^32 so that sums do not wrap."""
    counter = coordinate * np.uint64(_NUM_ROUNDS) + np.uint64(number)
    return _mix(key + counter * _INCREMENT) >> np.uint64(32)


def _mix(state: U64) -> U64:
    state = state + _INCREMENT
    state = (state ^ (state >> np.uint64(30))) * _FACTOR_1
    state = (state ^ (state >> np.uint64(27))) * _FACTOR_2
    return state ^ (state >> np.uint64(31))
