"""MXFP8: how far a number can be from its rounded value, what a block shares, and where tensor cores read scales."""

import math

import pytest
import torch

from trainer.ops.mx_format import BLOCK, quantize, scale_tiles


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_number_is_off_by_half_a_unit_of_its_block_at_most(dtype: torch.dtype) -> None:
    """Three mantissa bits, down to 2^-6 of the scale; nothing saturates, and no smaller scale would do."""
    draw = torch.Generator().manual_seed(0)
    sizes = torch.logspace(-30, 30, 61, dtype=torch.float64)[:, None]
    x = (torch.randn(61, 4 * BLOCK, generator=draw, dtype=torch.float64) * sizes).to(dtype)
    blocks = quantize(x)
    x, rounded = x.double(), blocks.dequantized(torch.float64)
    scale = blocks.scale.double().repeat_interleave(BLOCK, dim=1)
    assert ((rounded - x).abs() <= torch.maximum(x.abs() / 16, scale * 2.0**-10)).all()
    largest = x.abs().unflatten(1, (-1, BLOCK)).amax(-1) / blocks.scale.double()
    assert ((largest > 224) & (largest <= 448)).all()


def test_a_rounded_block_is_a_fixed_point_and_exact_in_bfloat16() -> None:
    x = torch.randn(5, 2 * BLOCK, generator=torch.Generator().manual_seed(0)) * 100
    rounded = quantize(x).dequantized(torch.bfloat16)
    assert torch.equal(quantize(rounded).dequantized(torch.float64), rounded.double())
    assert torch.equal(quantize(x).dequantized(torch.float32), rounded.float())


@pytest.mark.parametrize(
    ("largest", "scale"), [(448.0, 1.0), (448.1, 2.0), (224.0, 0.5), (1.75 * 2.0**-100, 2.0**-108)]
)
def test_the_scale_is_the_smallest_under_which_the_largest_fits(largest: float, scale: float) -> None:
    assert quantize(torch.full((BLOCK,), largest)).scale.tolist() == [scale]


def test_zeros_stay_zeros_and_numbers_below_the_format_become_zeros() -> None:
    assert not quantize(torch.zeros(BLOCK)).dequantized(torch.float32).any()
    assert not quantize(torch.full((BLOCK,), 1e-45)).dequantized(torch.float32).any()


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_makes_its_block_nan_and_no_other(value: float) -> None:
    x = torch.ones(2, 2 * BLOCK)
    x[1, 3] = value
    is_nan = quantize(x).dequantized(torch.float32).isnan()
    assert is_nan[1, :BLOCK].all() and int(is_nan.sum()) == BLOCK


@pytest.mark.parametrize("shape", [(130, 5), (2, 128, 4), (3, 40, 9)], ids=str)
def test_scales_lie_in_tiles_of_128_rows_and_4_columns(shape: tuple[int, ...]) -> None:
    draw = torch.Generator().manual_seed(0)
    scale = torch.randint(1, 255, shape, generator=draw, dtype=torch.uint8)
    tiles = scale_tiles(scale.view(torch.float8_e8m0fnu)).view(torch.uint8)
    rows, columns = shape[-2:]
    assert tiles.shape == (*shape[:-2], -(-rows // 128), -(-columns // 4), 512)
    for row in range(rows):
        for column in range(columns):
            place = 16 * (row % 32) + 4 * (row % 128 // 32) + column % 4
            assert torch.equal(tiles[..., row // 128, column // 4, place], scale[..., row, column])
    assert int((tiles > 0).sum()) == scale.numel(), "the rest is empty"
