"""Tests for which heads ranks exchange; what they compute is under tests/laws/test_context_parallel.py."""

import pytest
import torch

from trainer.distributed.collectives import Group
from trainer.ops.attention import torch_attention
from trainer.parallel.ulysses import UlyssesAttention, key_heads


@pytest.mark.parametrize(
    ("slice_of_heads", "group_size", "expected"),
    [
        ((0, 4), 2, [0, 1]),
        ((4, 8), 4, [1]),
        ((2, 4), 8, [0]),
        ((0, 3), 2, [0, 0, 1]),
        ((1, 3), 2, [0, 1]),
        ((2, 5), 1, [2, 3, 4]),
    ],
)
def test_a_rank_gets_the_key_heads_of_its_queries(
    slice_of_heads: tuple[int, int], group_size: int, expected: list[int]
) -> None:
    assert key_heads(*slice_of_heads, group_size) == expected


def test_whole_rows_are_the_kernels_own() -> None:
    attend = UlyssesAttention(Group.of_one(), torch_attention)
    q, k, v = torch.randn(3, 2, 4, 8, 6).unbind()
    assert torch.equal(attend(q, k, v), torch_attention(q, k, v))
