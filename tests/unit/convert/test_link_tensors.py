"""Their tensors from ours and back."""

import pytest
import torch

from trainer.convert.link_tensors import region_of, to_ours, to_theirs
from trainer.families.link import Interleaved, Link


def _link(shape: tuple[int, ...], at: tuple[tuple[int, int], ...] = (), **fields: object) -> Link:
    return Link(theirs="theirs", shape=shape, ours="ours", at=at, **fields)  # pyrefly: ignore


def test_an_expert_is_a_region_without_its_dimension() -> None:
    ours = torch.arange(2 * 6 * 3).view(2, 6, 3)
    link = _link((3, 3), ((1, 2), (3, 6)))
    theirs = to_theirs(region_of(ours, link), link)
    assert torch.equal(theirs, ours[1, 3:])
    assert theirs.data_ptr() == ours[1, 3:].data_ptr(), "a view"
    assert torch.equal(to_ours(theirs, link, (1, 3, 3)), ours[1:, 3:])


def test_a_transposed_and_interleaved_tensor_is_gpt_oss_s() -> None:
    """Gate and up alternate in the last dimension of theirs, which is our second."""
    ours = torch.arange(2 * 6 * 3).view(2, 6, 3)  # (E, 2 F, D)
    link = _link((2, 3, 6), interleaved=Interleaved(dim=-2, block=6, within=(0, 6)), transposed=True)
    theirs = to_theirs(ours, link)
    assert torch.equal(theirs[..., ::2], ours[:, :3].mT) and torch.equal(theirs[..., 1::2], ours[:, 3:].mT)
    assert torch.equal(to_ours(theirs, link, (2, 6, 3)), ours)


@pytest.mark.parametrize("dim", [0, -2])
def test_only_the_rotary_rows_of_each_head_are_interleaved(dim: int) -> None:
    """Two heads of 2 rows without positions and 4 with."""
    ours = torch.arange(12)[:, None].repeat(1, 2)
    link = _link((12, 2), interleaved=Interleaved(dim=dim, block=6, within=(2, 6)))
    theirs = to_theirs(ours, link)
    assert theirs[:, 0].tolist() == [0, 1, 2, 4, 3, 5, 6, 7, 8, 10, 9, 11]
    assert torch.equal(to_ours(theirs, link, (12, 2)), ours)


def test_a_bias_is_interleaved_in_its_last_dimension() -> None:
    ours = torch.arange(12).view(2, 6)
    link = _link((2, 6), interleaved=Interleaved(dim=-1, block=6, within=(0, 6)))
    theirs = to_theirs(ours, link)
    assert theirs[0].tolist() == [0, 3, 1, 4, 2, 5]
    assert torch.equal(to_ours(theirs, link, (2, 6)), ours)
