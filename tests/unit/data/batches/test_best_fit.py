import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.batches.best_fit import best_fit_decreasing


def rooms_of(lengths: list[int], room: int) -> list[int]:
    """Return the free space of each row by definition: longest first, each into the fullest row that has space."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, left in enumerate(rooms) if left >= length]
        if fitting:
            rooms[min(fitting, key=rooms.__getitem__)] -= length
        else:
            rooms.append(room - length)
    return sorted(rooms)


@settings(max_examples=200)
@given(room=st.integers(1, 40), data=st.data())
def test_rows_are_those_of_the_definition(room, data):
    lengths = data.draw(st.lists(st.integers(1, room), max_size=80))
    row_of = best_fit_decreasing(np.array(lengths, dtype=np.int64), room)
    used = np.bincount(row_of, weights=lengths).astype(int)
    assert sorted(room - used) == rooms_of(lengths, room)


def test_an_example_by_hand():
    assert best_fit_decreasing(np.array([5, 1, 5, 4, 3]), 9).tolist() == [0, 0, 1, 1, 0]


def test_what_fills_a_row_shares_it_with_nothing():
    assert sorted(best_fit_decreasing(np.array([4, 4, 1, 4]), 4).tolist()) == [0, 1, 2, 3]


def test_rows_are_nearly_full_where_documents_are_many():
    lengths = np.random.default_rng(0).lognormal(5, 1, 100_000).astype(np.int64).clip(1, 2048)
    num_rows = best_fit_decreasing(lengths, 2048).max() + 1
    assert lengths.sum() / (num_rows * 2048) > 0.999
