"""Tests for slices of global tensors: consecutive rows, and rows apart from each other."""

import torch

from trainer.checkpoint.state import Slice

ROWS = torch.arange(8.0).view(4, 2)


def test_rows_apart_are_runs_of_consecutive_ones() -> None:
    mine = Slice(tensor=ROWS, global_shape=(9, 2)).at([1, 2, 5, 7])
    assert (mine.start, mine.numbers) == (1, (1, 2, 5, 7))
    assert mine.spans == [(0, 1, 2), (2, 5, 1), (3, 7, 1)]
    part = mine.part(1, ROWS[1:3])
    assert (part.start, part.spans) == (2, [(0, 2, 1), (1, 5, 1)])
    assert mine.part(4, ROWS[4:]).spans == [(0, 0, 0)], "an empty part is nowhere"


def test_consecutive_rows_have_a_start() -> None:
    mine = Slice(tensor=ROWS, global_shape=(9, 2)).at(range(3, 7))
    assert (mine.start, mine.numbers, mine.spans) == (3, None, [(0, 3, 4)])
    part = mine.part(1, ROWS[1:3])
    assert (part.start, part.numbers, part.spans) == (4, None, [(0, 4, 2)])
