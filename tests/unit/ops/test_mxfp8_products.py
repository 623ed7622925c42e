"""MXFP8 products: each operand is rounded along the summed dimension; the GPU's layout; the error against float32."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.ops.expert_ffn import reference_ffn
from trainer.ops.kernel_canary import GROUPS, groups_fault, kernel_fault
from trainer.ops.kernels import choose_experts_kernel, emulation_of, missing_kernel, run_experts
from trainer.ops.layer_widths import LayerWidths
from trainer.ops.mx_format import BLOCK, quantize
from trainer.ops.mxfp8_products import EmulatedMXFP8Products, MXFP8Products
from trainer.ops.oracle_difference import layer_result

CPU = torch.device("cpu")
SIZES = torch.tensor([128, 0, 384, 128])
UNUSED = 40
"""Rows after the last group."""
K, N = 160, 96


def _draw(*shape: int, seed: int = 0) -> Tensor:
    """Return numbers of very different sizes, so that a scale of another block shows."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=draw) * torch.exp(2 * torch.randn(shape, generator=draw))


def _rounded(x: Tensor, dim: int) -> Tensor:
    """Round along a dimension, block by block."""
    pieces = x.split(BLOCK, dim)
    return torch.cat([quantize(p.movedim(dim, -1)).dequantized(torch.float64).movedim(-1, dim) for p in pieces], dim)


def test_operands_are_rounded_along_the_dimension_that_is_summed() -> None:
    sizes = SIZES // 4  # the emulation needs multiples of 32 only
    num_rows = int(sizes.sum()) + UNUSED
    x, w, other = _draw(num_rows, K), _draw(4, K, N, seed=1), _draw(num_rows, N, seed=2)
    products = EmulatedMXFP8Products(sizes, num_rows)
    rows, weights = products.rows(x, w), products.weights(x, other)
    left, right = _rounded(x, 1), _rounded(w, 1)
    start = 0
    for e, size in enumerate(sizes.tolist()):
        group = slice(start, start := start + size)
        torch.testing.assert_close(rows[group].double(), left[group] @ right[e], rtol=1e-5, atol=1e-3)
        expected = torch.zeros(K, N, dtype=torch.float64)
        if size:
            expected = _rounded(x[group], 0).T @ _rounded(other[group], 0)
        torch.testing.assert_close(weights[e].double(), expected, rtol=1e-5, atol=1e-3)
    assert not rows[start:].any()


def _unpacked(values: Tensor, scale: Tensor) -> Tensor:
    """Multiply values (M, K) by the scales that tensor cores find for them in tiles."""
    tiles = scale.contiguous().view(torch.uint8).flatten().view(-1, -(-values.shape[1] // 128), 512)
    row, column = torch.arange(values.shape[0])[:, None], torch.arange(values.shape[1] // BLOCK)
    place = 16 * (row % 32) + 4 * (row % 128 // 32) + column % 4
    found = tiles[row // 128, column // 4, place].view(torch.float8_e8m0fnu).float()
    return values.float() * found.repeat_interleave(BLOCK, 1)


def _like_a_gpu(
    left: Tensor, right: Tensor, left_scale: Tensor, one: Any, right_scale: Tensor, other: Any, **given: Any
):
    """Compute torch's scaled grouped product from the layout that its CUDA kernel reads, after its own checks."""
    assert one == other == F.ScalingType.BlockWise1x32
    assert given["swizzle_a"] == given["swizzle_b"] == F.SwizzleType.SWIZZLE_32_4_4
    offs, operands = given["offs"], (left, right, left_scale, right_scale)
    checked = torch.ops.aten._scaled_grouped_mm(
        *(x.to("meta") for x in operands), offs=offs.to("meta"), out_dtype=given["output_dtype"]
    )
    assert left.shape[-1] % 16 == 0 and right.shape[-1] % 16 == 0 and right.shape[-2] % 16 == 0
    is_rows, flat = right.dim() == 3, left_scale.flatten()
    out = torch.full(checked.shape, torch.nan, dtype=torch.bfloat16)  # as uninitialized as it gets
    start, height, width = 0, -(-left.shape[0] // 128), -(-right.shape[-1] // 128)
    for e, end in enumerate(offs.tolist()):
        if end > start and is_rows:
            per_row = -(-left.shape[1] // 128) * 4
            scale = flat[start * per_row : end * per_row]
            out[start:end] = _unpacked(left[start:end], scale) @ _unpacked(right[e].T, right_scale[e]).T
        elif end > start:  # tiles of a group are together
            begin, count = start // 128 * 512, (end - start) // 128 * 512
            pieces = (flat, left, height), (right_scale.flatten(), right.T, width)
            a, b = (_unpacked(x[:, start:end], s[begin * h : (begin + count) * h]) for s, x, h in pieces)
            out[e] = a @ b.T
        start = end
    return out


def test_a_gpu_finds_the_scale_of_each_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """By torch's checks of shapes and strides, and a product of what its kernel reads; no GPU has run it."""
    monkeypatch.setattr(F, "scaled_grouped_mm", _like_a_gpu)
    num_rows = int(SIZES.sum()) + UNUSED
    x, w, other = _draw(num_rows, K), _draw(4, K, N, seed=1), _draw(num_rows, N, seed=2)
    mine, emulated = MXFP8Products(SIZES, num_rows), EmulatedMXFP8Products(SIZES, num_rows)
    used = num_rows - UNUSED
    pairs = [(mine.rows(x, w)[:used], emulated.rows(x, w)[:used]), (mine.weights(x, other), emulated.weights(x, other))]
    groups = x[:used].split(SIZES.tolist())
    exact = torch.stack([rows.double().sum(0) for rows in groups]).float()  # not quantized
    pairs += [(mine.sums(x), exact), (emulated.sums(x), exact)]
    for found, expected in pairs:
        assert found.isfinite().all()
        torch.testing.assert_close(found.float(), expected, rtol=2.0**-8, atol=1e-3)


def test_a_gpu_need_not_wait_for_the_sizes_of_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors without values have no sizes to wait for."""

    def shapes_only(*args: Any, **given: Any) -> Tensor:
        left, right, left_scale, _, right_scale, _ = args
        operands, offs = (left, right, left_scale, right_scale), given["offs"]
        return torch.ops.aten._scaled_grouped_mm(*operands, offs=offs, out_dtype=given["output_dtype"])

    monkeypatch.setattr(F, "scaled_grouped_mm", shapes_only)
    x, w, other = (torch.empty(shape, device="meta") for shape in ((1000, K), (4, K, N), (1000, N)))
    products = MXFP8Products(torch.empty(4, device="meta", dtype=torch.int64), 1000)
    assert products.rows(x, w).shape == (1000, N) and products.weights(x, other).shape == (4, K, N)


@pytest.mark.gpu
@pytest.mark.skipif(missing_kernel("mxfp8") is not None or not torch.cuda.is_available(), reason="needs compute 10.0")
def test_the_canary_passes_on_a_gpu() -> None:
    widths = LayerWidths(d_model=1056, d_ff=224, activation="swiglu", dtype=torch.bfloat16)
    run = partial(run_experts, "mxfp8")
    assert kernel_fault(run, widths, torch.device("cuda"), emulation=emulation_of("mxfp8")) is None


ERRORS = {"y": 0.0673, "x_grad": 0.0671, "weight_grad": 0.0703, "w_in_grad": 0.0681, "w_out_grad": 0.0667}
"""Relative error, by norm, against float32: Gaussian inputs, E 4, k 2, D 128, F 96, T 256 (docs/benchmarks.md)."""


def _gaussian() -> tuple[Tensor, list[Tensor], Tensor]:
    """Return experts, inputs and the gradient of the outputs."""
    draw = torch.Generator().manual_seed(0)
    index = torch.rand(256, 4, generator=draw).argsort(1)[:, :2]
    shapes = {(256, 128): 1.0, (256, 2): 1.0, (4, 192, 128): 128**-0.5, (4, 128, 96): 96**-0.5}
    inputs = [torch.randn(shape, generator=draw) * scale for shape, scale in shapes.items()]
    return index, [x.requires_grad_() for x in inputs], torch.randn(256, 128, generator=draw)


def test_the_error_against_float32_is_the_stated_one() -> None:
    index, inputs, grad = _gaussian()
    x, weight, w_in, w_out = inputs
    found = layer_result(run_experts("mxfp8", x, index, weight, w_in, w_out, "swiglu"), grad, inputs)
    exact = layer_result(reference_ffn(x, index, weight, w_in, w_out, "swiglu"), grad, inputs)
    errors = {
        name: float((getattr(found, name) - getattr(exact, name)).norm() / getattr(exact, name).norm())
        for name in ERRORS
    }
    assert errors == pytest.approx(ERRORS, rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masters_get_float32_gradients_and_idle_experts_none(dtype: torch.dtype) -> None:
    index, inputs, _ = _gaussian()
    index = torch.where(index == 2, 4, index)
    x, weight, w_in, w_out = inputs
    y = run_experts("mxfp8", x.to(dtype), index, weight, w_in, w_out, "swiglu")
    grads = torch.autograd.grad(y.square().sum(), [w_in, w_out])
    assert y.dtype == torch.float32 and all(g.dtype == torch.float32 and not g[2].any() and g[1].any() for g in grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_canary_compares_it_with_its_emulation(dtype: torch.dtype) -> None:
    """The oracle would refuse it; a kernel that loses a row of a group is refused all the same."""
    widths = LayerWidths(d_model=64, d_ff=96, activation="swiglu", dtype=dtype)
    sound, emulation = partial(run_experts, "mxfp8"), emulation_of("mxfp8")

    def loses_a_row(x: Tensor, index: Tensor, *rest: Any) -> Tensor:
        index = index.clone()
        token, slot = (index == 4).nonzero()[0].tolist()
        index[token, slot] = 6
        return run_experts("mxfp8", x, index, *rest)

    assert kernel_fault(sound, widths, CPU, emulation=emulation) is None
    assert "the output" in str(groups_fault(sound, GROUPS, widths, CPU))
    assert "the output" in str(groups_fault(loses_a_row, GROUPS, widths, CPU, emulation=emulation))
    assert all(emulation_of(kernel) is None for kernel in ("loop", "grouped", "triton", "module:function"))


@pytest.mark.parametrize(("capability", "is_fit"), [((10, 0), True), ((9, 0), False), ((12, 0), False)])
def test_a_gpu_without_the_format_is_refused(
    capability: tuple[int, int], is_fit: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    message = f"mxfp8 needs a GPU of compute capability 10.0, and this one has {capability[0]}.0; use auto"
    assert missing_kernel("mxfp8", "cuda") == (None if is_fit else message)
    assert missing_kernel("mxfp8", "cpu") is None


def test_it_is_never_chosen_by_itself() -> None:
    for device in ("cpu", "cuda"):
        for dtype in (torch.float32, torch.bfloat16):
            sizes = {"cpu_vendor": "", "rows_per_expert": 10_000, "d_model": 64, "d_ff": 64}
            assert choose_experts_kernel(device, dtype, **sizes) != "mxfp8"
