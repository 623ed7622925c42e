"""Tests for a rank's part of the rows that it shares."""

import torch

from tests.builders import make_packed_batch
from trainer.data.batches.row_parts import own_part
from trainer.distributed.rank_layout import Layout
from trainer.ops.zigzag import in_row_order


def test_the_parts_of_a_batch_are_its_tokens_with_all_that_is_known_of_each() -> None:
    batch = make_packed_batch(3, 16, first_sample=5)
    layouts = [Layout(world_size=8, rank=rank, cp_size=4) for rank in range(8)]
    parts = [own_part(batch, layout) for layout in layouts]
    for name, whole in batch.tensors().items():
        assert torch.equal(in_row_order([part.tensors()[name] for part in parts[:4]]), whole), name
        assert torch.equal(parts[5].tensors()[name], parts[1].tensors()[name]), "by its place among those that share"
    assert all(torch.equal(part.tensors()["row_document_id"], batch.document_id) for part in parts)
    assert sum(part.num_valid for part in parts[:4]) == batch.num_valid
    assert sum(part.target_weight for part in parts[:4]) == batch.target_weight
    assert own_part(batch, Layout(world_size=8, rank=3)) is batch
