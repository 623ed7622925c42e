from collections import Counter
from itertools import permutations

import numpy as np
import pytest

from trainer.data.permutation import hash64, permute_index


def whole(size: int, *key: int) -> list[int]:
    return permute_index(np.arange(size, dtype=np.uint64), size=size, key=hash64(*key)).tolist()


def many(size: int, *, num_keys: int) -> np.ndarray:
    """Return the permutations of keys 0, 1, ... as (num_keys, size)."""
    index = np.tile(np.arange(size, dtype=np.uint64), num_keys)
    keys = hash64(np.arange(num_keys, dtype=np.uint64)).repeat(size)
    return permute_index(index, size=size, key=keys).astype(np.int64).reshape(num_keys, size)


def test_the_order_never_changes_between_releases():
    assert whole(10, 1337) == [8, 5, 4, 6, 3, 1, 9, 2, 0, 7]


def test_keys_give_different_orders():
    assert len({tuple(whole(20, key)) for key in range(100)}) == 100


def test_every_element_can_have_a_key_of_its_own():
    keys = hash64(np.arange(5, dtype=np.uint64))
    together = permute_index(np.full(5, 3, dtype=np.uint64), size=7, key=keys)
    assert together.tolist() == [whole(7, key)[3] for key in range(5)]


def test_one_element_stays():
    assert whole(1, 5) == [0]


def test_nothing_has_no_permutation():
    with pytest.raises(ValueError, match="size 0"):
        permute_index(np.zeros(0, dtype=np.uint64), size=0, key=hash64(1))


def test_no_index_gives_no_index():
    assert permute_index(np.zeros(0, dtype=np.uint64), size=5, key=hash64(1)).tolist() == []


def test_every_order_of_four_is_equally_common():
    counts = Counter(map(tuple, many(4, num_keys=4800).tolist()))
    # 24 orders, 200 expected of each: chi-square with 23 degrees of freedom is below 50 in 99.9 % of cases.
    assert sum((counts[order] - 200) ** 2 / 200 for order in permutations(range(4))) < 50


def test_every_place_is_equally_likely_for_every_element():
    size, num_keys = 50, 2000
    orders = many(size, num_keys=num_keys)
    counts = np.stack([np.bincount(orders[:, element], minlength=size) for element in range(size)])
    expected = num_keys / size
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 2400 + 4 * np.sqrt(2 * 2401)  # (size - 1)^2 degrees of freedom, four standard deviations


def test_neighbours_do_not_stay_together():
    order = np.array(whole(10_000, 3))
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.04  # four standard deviations of independent draws


def test_a_hash_depends_on_every_part_and_on_their_order():
    hashes = [hash64(1, 2), hash64(2, 1), hash64(1), hash64(1, 2, 0), hash64(1, 3), hash64(0)]
    assert len({int(h[0]) for h in hashes}) == 6


def test_a_hash_takes_numbers_of_any_size():
    assert hash64(2**64 + 5) == hash64(5)
    assert hash64(-1) == hash64(2**64 - 1)


def test_a_hash_of_an_array_is_the_array_of_hashes():
    assert hash64(7, np.array([1, 2], dtype=np.uint64)).tolist() == [int(hash64(7, 1)[0]), int(hash64(7, 2)[0])]
