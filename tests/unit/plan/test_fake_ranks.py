"""What stands for many ranks in one process."""

import pytest
import torch
from torch.distributed.fsdp._fully_shard._fsdp_common import _chunk_with_empty

from trainer.plan.fake_ranks import RankChunks


@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9, 12, 33])
@pytest.mark.parametrize(("num_ranks", "dim"), [(1, 0), (4, 0), (8, 0), (3, 1)])
def test_chunks_are_those_of_fsdp(rows: int, num_ranks: int, dim: int) -> None:
    weight = torch.randn(rows, 6, 2)
    found, expected = RankChunks(weight, num_ranks, dim), _chunk_with_empty(weight, num_ranks, dim)
    assert len(found) == len(expected)
    for rank, chunk in enumerate(expected):
        assert torch.equal(found[rank], chunk)
