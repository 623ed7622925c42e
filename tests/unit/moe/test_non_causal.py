"""The capacity of all sequences at once is that of each."""

import pytest
import torch

from trainer.moe.routers.non_causal import rows_on_host, sequence_capacities, sequence_capacity


@pytest.mark.parametrize("factor", [0.125, 0.7, 1.0, 1.1, 1.25, 2.0, 3.3])
@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (3, 2), (8, 1), (10, 3), (64, 6)])
def test_capacities_of_all_sequences_are_those_of_each(factor: float, num_experts: int, top_k: int) -> None:
    valid = torch.arange(300) < torch.arange(301)[:, None]  # 0 to 300 valid tokens
    expected = [sequence_capacity(n, num_experts, top_k=top_k, factor=factor) for n in range(301)]
    assert sequence_capacities(valid, num_experts, top_k=top_k, factor=factor).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_come_to_the_host_bit_by_bit(dtype: torch.dtype) -> None:
    scores = torch.tensor([[[1 / 3, torch.nan], [-torch.inf, 1e-30]]], dtype=dtype)
    there, is_valid = rows_on_host(scores, torch.tensor([[True, False]]))
    torch.testing.assert_close(there, scores, rtol=0, atol=0, equal_nan=True)
    assert there.dtype == dtype and is_valid.tolist() == [[True, False]]
