"""A mask shows each query the same keys in every form."""

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask

from trainer.ops.attention_mask import AttentionMask

BLOCK = 128


def _rows(mask: Tensor) -> list[str]:
    return ["".join("x" if cell else "." for cell in row) for row in mask.tolist()]


def test_a_mask_allows_the_same_document_and_nothing_later() -> None:
    mask = AttentionMask(document=torch.tensor([[0, 0, 3, 3, -1, -1]])).dense()
    assert _rows(mask[0, 0]) == ["x.....", "xx....", "..x...", "..xx..", "....x.", "....xx"]


def test_a_window_of_two_is_a_token_and_the_one_before() -> None:
    mask = AttentionMask(document=torch.tensor([[0, 0, 0, 0, 1]]), window=2).dense()
    assert _rows(mask[0, 0]) == ["x....", "xx...", ".xx..", "..xx.", "....x"]


def _documents(S: int, *, rows: int = 3, every: int = 40) -> Tensor:
    """Return ragged documents; the first row is one document, the last ends in padding."""
    document = (torch.rand(rows, S, generator=torch.Generator().manual_seed(S)) < 1 / every).cumsum(1)
    document[0] = 7
    document[-1, S // 2 :] = -1
    return document


@pytest.mark.parametrize("window", [None, 1, 50, 128, 200])
@pytest.mark.parametrize("S", [1, 40, 128, 300, 700])
def test_blocks_show_the_keys_of_the_dense_mask(S: int, window: int | None) -> None:
    mask = AttentionMask(document=_documents(S), window=window)
    dense, blocks = mask.dense(), mask.blocks()
    assert torch.equal(create_mask(blocks.mask_mod, 3, 1, S, S, device="cpu"), dense), "within a block"
    met, whole = _expanded(blocks.kv_num_blocks, blocks.kv_indices), _expanded(*_whole(blocks))
    assert not (_in_any(dense) & ~(met | whole)).any(), "each visible key is in a block that is met"
    assert not (_in_any(~dense) & whole).any(), "no hidden key is in a block that is met without a mask"
    assert not (met & whole).any()


def _in_any(pairs: Tensor) -> Tensor:
    """Return (B, 1, n, n): whether a block has any of the pairs (B, 1, S, S); the kernel cuts off what is after S."""
    n = -(-pairs.shape[-1] // BLOCK)
    beyond = n * BLOCK - pairs.shape[-1]
    padded = torch.nn.functional.pad(pairs, (0, beyond, 0, beyond)).view(len(pairs), 1, n, BLOCK, n, BLOCK)
    return padded.any(-1).any(-2)


def _whole(blocks: object) -> tuple[Tensor, Tensor]:
    return blocks.full_kv_num_blocks, blocks.full_kv_indices  # pyrefly: ignore[missing-attribute]


def _expanded(counts: Tensor, indices: Tensor) -> Tensor:
    """Return (B, 1, n, n) bool from lists of blocks."""
    listed = torch.arange(indices.shape[-1]) < counts[..., None]
    return torch.zeros_like(listed).scatter(-1, indices.long(), listed)


def test_blocks_that_nobody_sees_are_left_out() -> None:
    S = 8 * BLOCK
    document = (torch.arange(S) // (2 * BLOCK))[None]  # four documents of two blocks
    blocks = AttentionMask(document=document).blocks()
    assert blocks.kv_num_blocks.flatten().tolist() == [1] * 8, "the block of the query itself"
    assert _whole(blocks)[0].flatten().tolist() == [0, 1] * 4, "the one before, of the same document"
    narrow = AttentionMask(document=torch.zeros(1, S, dtype=torch.int64), window=BLOCK).blocks()
    assert narrow.kv_num_blocks.flatten().tolist() == [1] + [2] * 7


def test_one_row_of_documents_stands_for_all() -> None:
    shared, apart = (AttentionMask(document=_documents(300)[1:2].repeat(rows, 1), window=60) for rows in (1, 3))
    assert shared.dense().shape == (1, 1, 300, 300) and torch.equal(shared.dense().expand(3, -1, -1, -1), apart.dense())
    assert torch.equal(create_mask(shared.blocks().mask_mod, 3, 1, 300, 300, device="cpu"), apart.dense())
