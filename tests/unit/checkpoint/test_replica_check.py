"""Checksums of tensors, and messages about copies that differ."""

import pytest
import torch

from trainer.checkpoint.replica_check import _message, check_copies, checksum
from trainer.checkpoint.state import Slice, TrainState
from trainer.distributed.mesh import Mesh

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8]


def _values(dtype: torch.dtype, count: int) -> torch.Tensor:
    raw = torch.randint(0, 256, (count * dtype.itemsize,), generator=torch.Generator().manual_seed(count))
    return raw.to(torch.uint8).view(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_every_flipped_bit_changes_the_checksum(dtype: torch.dtype, count: int) -> None:
    values = _values(dtype, count)
    before, raw = int(checksum(values)), values.view(torch.uint8)
    for i in range(len(raw)):
        for bit in range(8):
            raw[i] ^= 1 << bit
            assert int(checksum(values)) != before
            raw[i] ^= 1 << bit
    assert int(checksum(values)) == before


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_checksum_does_not_depend_on_memory_layout(dtype: torch.dtype) -> None:
    values = _values(dtype, 48)
    shifted = torch.cat([values[:1], values])[1:]  # starts inside an 8-byte word
    assert int(checksum(shifted)) == int(checksum(values))
    spread = values.view(6, 8).t().contiguous().t()
    assert not spread.is_contiguous() and int(checksum(spread)) == int(checksum(values.view(6, 8)))


@pytest.mark.parametrize("row", [(3, 5), (4, 2)])
def test_permuted_experts_have_another_checksum(row: tuple[int, ...]) -> None:
    experts = torch.randn(4, *row, generator=torch.Generator().manual_seed(0))
    assert int(checksum(experts)) != int(checksum(experts[[0, 2, 1, 3]]))
    flipped = experts.clone()
    flipped[0, 0, 0], flipped[1, 0, 0] = -0.0, 0.0
    experts[0, 0, 0], experts[1, 0, 0] = 0.0, -0.0
    assert int(checksum(experts)) != int(checksum(flipped)), "opposite flips in two experts do not cancel"


@pytest.mark.parametrize("shape", [(0,), (0, 3), ()])
def test_scalar_and_empty_tensors_have_a_checksum(shape: tuple[int, ...]) -> None:
    total = checksum(torch.ones(shape))
    assert total.dtype is torch.int64 and total.shape == ()
    assert bool(total) == (shape == ())


def test_negative_zeros_and_nans_are_compared_by_their_bits() -> None:
    zero, nan = torch.zeros(2), torch.full((2,), float("nan"))
    assert int(checksum(zero)) != int(checksum(torch.tensor([0.0, -0.0])))
    assert int(checksum(nan)) == int(checksum(nan.clone())), "equal bits are equal, whatever they mean"


def test_a_single_process_has_no_replicas() -> None:
    state = TrainState(slices={"model.x": Slice.whole(torch.ones(3))})
    check_copies(state, Mesh.of_one(), step=1, equal_at=None)


def _column(*parts: tuple[int, int, int]) -> torch.Tensor:
    return torch.tensor(parts)


def test_tensors_of_the_same_faulty_rank_are_named_together() -> None:
    wrong_1 = _column((0, 4, 7), (0, 4, 8), (0, 4, 7))
    columns = {f"model.{name}": wrong_1 for name in "abcde"} | {"optim.x": _column((0, 4, 1), (0, 4, 2), (0, 4, 3))}
    assert _message(columns, 12, 10, first_rank=0) == (
        "step 12: rank 1 holds another copy of a, b, c and 2 more tensors than ranks 0 and 2; ranks 0, 1 and 2 hold "
        "different copies of optim.x, and which of them is wrong cannot be told; all copies were equal at step 10. "
        "Nothing has been saved since: start the run again; it continues from the last checkpoint; if it happens "
        "again, suspect the memory of the host of ranks 0, 1 and 2"
    )


def test_each_part_of_a_tensor_is_compared_with_its_own_copies() -> None:
    column = _column((0, 2, 5), (2, 1, 6), (0, 2, 5), (2, 1, 7), (0, 2, 5), (2, 1, 7))
    said = _message({"model.w_in": column}, 3, 0, first_rank=0)
    assert said.startswith("step 3: rank 1 holds another copy of w_in than ranks 3 and 5; all copies were equal")
    assert said.endswith("of the host of rank 1")
