"""Tests for balanced parts of rows."""

import pytest
import torch

from trainer.ops.zigzag import in_row_order, part_of


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_parts_hold_a_front_chunk_and_its_mirror_and_make_the_row_again(n: int) -> None:
    row = torch.arange(12 * n).view(1, -1).expand(2, -1)
    parts = [part_of(row, index, n) for index in range(n)]
    assert torch.equal(in_row_order(parts), row)
    if n > 1:
        visible = [int((part[0] + 1).sum()) for part in parts]  # keys that a causal query at p sees
        assert len(set(visible)) == 1, "every part has as much to do"
    assert parts[0][0].tolist() == [*range(6), *range(12 * n - 6, 12 * n)]
    deep = torch.randn(2, 3, 12 * n, 5)
    assert torch.equal(in_row_order([part_of(deep, index, n, dim=2) for index in range(n)], dim=2), deep)
