"""Parts of matrices that are drawn alone are the same parts of the whole ones."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from trainer.models import drawn_slice
from trainer.models.drawn_slice import fill, normal_pieces, uniform_pieces

BLOCKS = pytest.mark.parametrize("block", [16, 48, 1 << 16])


def whole(shape: tuple[int, int], *, is_normal: bool) -> Tensor:
    """Return the matrix that torch's generator fills at once."""
    generator, values = torch.Generator().manual_seed(11), torch.empty(shape)
    if is_normal:
        return values.normal_(0.0, 0.3, generator=generator)
    return values.uniform_(-0.3, 0.3, generator=generator)


@BLOCKS
@pytest.mark.parametrize("is_normal", [True, False])
@given(data=st.data())
def test_a_part_of_a_matrix_is_that_of_the_whole(block: int, is_normal: bool, data: st.DataObject) -> None:
    shape = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 20))
    index = []
    for size in shape:
        start = data.draw(st.integers(0, size))
        index.append(slice(start, data.draw(st.integers(start, size))))
    expected = whole(shape, is_normal=is_normal)[tuple(index)]
    part = torch.full(expected.shape, float("nan"))
    pieces = normal_pieces(0.3) if is_normal else uniform_pieces(0.3)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(drawn_slice, "_BLOCK", block)
        fill(part, pieces, 11, shape=shape, index=index)
    assert torch.equal(part, expected)


@pytest.mark.parametrize("length", [15, 16, 17, 31, 32, 1000, 70_000])
def test_blocks_do_not_change_what_is_drawn(length: int) -> None:
    """Of lengths that are a multiple of 16 or not, and longer than a block."""
    part = torch.empty(length, 1)
    fill(part, normal_pieces(1.0), 11, shape=(length, 1), index=(slice(0, length), slice(0, 1)))
    assert torch.equal(part.view(-1), torch.empty(length).normal_(generator=torch.Generator().manual_seed(11)))


def test_weights_of_other_dtypes_start_from_the_float32_values() -> None:
    part = torch.empty(5, 7, dtype=torch.float64)
    fill(part, normal_pieces(0.3), 11, shape=(5, 7), index=(slice(0, 5), slice(0, 7)))
    assert torch.equal(part, whole((5, 7), is_normal=True).double())
