"""Every experts kernel equals the reference loop, on awkward group sizes."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.registries import KERNELS
from trainer.ops.activations import Activation
from trainer.ops.kernels import ExpertsKernel, choose_experts_kernel, run_experts

GROUPS = {
    "even": [4, 4, 4, 4],
    "one empty": [5, 0, 3, 1],
    "all to one": [0, 0, 9, 0],
    "single row": [0, 1, 0, 0],
    "no rows": [0, 0, 0, 0],
    "over a padding step": [65, 0, 64, 130],
}
D_MODEL, D_FF = 16, 24


def _run_rows(
    kernel: ExpertsKernel, x: Tensor, rows: list[int], w_in: Tensor, w_out: Tensor, activation: Activation = "swiglu"
) -> Tensor:
    """Run a kernel on rows that are grouped by expert already, each with weight 1."""
    expert = torch.arange(len(rows)).repeat_interleave(torch.tensor(rows))[:, None]
    weight = torch.ones(len(x), 1, dtype=torch.promote_types(x.dtype, torch.float32))
    return run_experts(kernel, x, expert, weight, w_in, w_out, activation)


def _run(kernel: ExpertsKernel, rows: list[int], dtype: torch.dtype, activation: Activation) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    width = 2 * D_FF if activation == "swiglu" else D_FF
    weights = torch.float64 if dtype is torch.float64 else torch.float32
    x = torch.randn(sum(rows), D_MODEL, generator=generator).to(dtype).requires_grad_()
    w_in = torch.randn(len(rows), width, D_MODEL, generator=generator).mul(0.3).to(weights).requires_grad_()
    w_out = torch.randn(len(rows), D_MODEL, D_FF, generator=generator).mul(0.3).to(weights).requires_grad_()
    y = _run_rows(kernel, x, rows, w_in, w_out, activation)
    assert y.dtype == dtype and y.shape == x.shape
    gradients = torch.autograd.grad(y.float().square().sum(), (x, w_in, w_out))
    assert [g.dtype for g in gradients] == [dtype, weights, weights]
    for e, n in enumerate(rows):
        if n == 0:
            assert not gradients[1][e].any() and not gradients[2][e].any(), "an idle expert has zero gradients"
    return [y.detach(), *gradients]


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("rows", GROUPS.values(), ids=GROUPS.keys())
@pytest.mark.parametrize(
    ("kernel", "dtype", "tolerance"),
    [
        ("padded", torch.float64, 1e-12),
        ("fused", torch.float64, 1e-12),
        ("padded", torch.float32, 1e-4),
        ("fused", torch.float32, 1e-4),
        ("grouped", torch.float32, 1e-4),
        ("fused_onednn", torch.float32, 1e-4),
        # bfloat16 has 8 bits: sums of up to 130 rows of magnitude 5 differ in the last one
        ("padded", torch.bfloat16, 0.05),
        ("fused", torch.bfloat16, 0.05),
        ("grouped", torch.bfloat16, 0.05),
    ],
    ids=str,
)
def test_kernel_equals_the_loop(
    kernel: ExpertsKernel, dtype: torch.dtype, tolerance: float, rows: list[int], activation: Activation
) -> None:
    for mine, oracle in zip(_run(kernel, rows, dtype, activation), _run("loop", rows, dtype, activation), strict=True):
        scale = max(1.0, float(oracle.abs().max()) if oracle.numel() else 1.0)
        torch.testing.assert_close(mine / scale, oracle / scale, rtol=0, atol=tolerance)


def _weights(num_experts: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    w_in = torch.randn(num_experts, 2 * D_FF, D_MODEL, generator=generator)
    return w_in, torch.randn(num_experts, D_MODEL, D_FF, generator=generator)


@pytest.mark.usefixtures("unwritten_memory_is_nan")
@pytest.mark.parametrize("poison", [torch.inf, torch.nan])
@pytest.mark.parametrize("rows", [[5, 0, 3], [0, 0, 4], [0, 0, 0]], ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_an_idle_expert_s_weights_have_no_part_in_anything(
    kernel: ExpertsKernel, rows: list[int], poison: float
) -> None:
    """Even if they are infinite: 0 times infinity is not 0."""
    x, weights = torch.randn(sum(rows), D_MODEL), _weights(len(rows))
    for weight in weights:
        weight[1, 2, 3] = poison
        weight.requires_grad_()
    y = _run_rows(kernel, x, rows, *weights)
    assert y.isfinite().all()
    for gradient in torch.autograd.grad(y.square().sum(), weights):
        assert gradient.isfinite().all() and not gradient[1].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_the_grouped_product_leaves_for_idle_experts_is_overwritten(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch's grouped product as in pytorch#172439: groups without rows get uninitialized memory."""
    rows, weights = [5, 0, 3, 0], [w.requires_grad_() for w in _weights(4)]
    x = torch.randn(8, D_MODEL).to(dtype)
    whole, calls = F.grouped_mm, []

    def blackwell(a: Tensor, b: Tensor, *, offs: Tensor) -> Tensor:
        out = whole(a, b, offs=offs)
        if b.ndim == 2:  # a product over rows
            calls.append(len(out))
            out[offs.diff(prepend=offs.new_zeros(1)) == 0] = torch.nan
        return out

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad(
            _run_rows("grouped", x, rows, weights[0], weights[1]).float().square().sum(), weights
        )

    sound = gradients()
    monkeypatch.setattr(F, "grouped_mm", blackwell)
    for mine, expected in zip(gradients(), sound, strict=True):
        assert not mine[1].any() and not mine[3].any()
        torch.testing.assert_close(mine, expected, rtol=0, atol=0)
    assert calls == [4, 4], "the emulation was used"


class _NoNaN(TorchDispatchMode):
    """Raises for every operation that produces a NaN."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        assert not (isinstance(result, Tensor) and result.is_floating_point() and result.isnan().any()), func
        return result


@pytest.mark.parametrize("kernel", KERNELS)
def test_without_a_row_infinite_weights_make_no_nan(kernel: ExpertsKernel) -> None:
    w_in, w_out = (torch.full_like(w, torch.inf).requires_grad_() for w in _weights(3))
    with _NoNaN():
        y = _run_rows(kernel, torch.empty(0, D_MODEL), [0, 0, 0], w_in, w_out)
    gradients = torch.autograd.grad(y.sum(), (w_in, w_out))
    assert y.shape == (0, D_MODEL) and not any(gradient.any() for gradient in gradients)


def _auto(
    device: str, dtype: torch.dtype, *, cpu_vendor: str = "GenuineIntel", rows: int = 1024, d_ff: int = 512
) -> ExpertsKernel:
    return choose_experts_kernel(device, dtype, cpu_vendor=cpu_vendor, rows_per_expert=rows, d_model=256, d_ff=d_ff)


def test_the_automatic_choice_is_a_kernel_that_runs_in_that_dtype() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for rows in (1, 100_000):
            for vendor in ("GenuineIntel", "AuthenticAMD", ""):
                kernel = _auto("cpu", dtype, cpu_vendor=vendor, rows=rows)
                assert kernel == _auto("cpu", dtype, cpu_vendor=vendor, rows=rows)
                for mine, oracle in zip(
                    _run(kernel, [5, 0, 3, 1], dtype, "swiglu"),
                    _run("loop", [5, 0, 3, 1], dtype, "swiglu"),
                    strict=True,
                ):
                    torch.testing.assert_close(mine, oracle, rtol=0.05, atol=0.05)


def test_the_automatic_choice_avoids_kernels_that_a_shape_does_not_allow() -> None:
    assert _auto("cuda", torch.bfloat16) == "grouped"
    assert _auto("cuda", torch.bfloat16, d_ff=511) == "loop", "rows of 16 bytes"
    assert _auto("cuda", torch.float64) == "loop"
    assert _auto("cpu", torch.float32, rows=1, d_ff=511) == "fused"


def test_small_weights_are_multiplied_by_mkl_on_every_processor() -> None:
    assert _auto("cpu", torch.float32, cpu_vendor="AuthenticAMD", d_ff=31) == "fused"
    assert _auto("cpu", torch.float32, cpu_vendor="AuthenticAMD", d_ff=32) in ("fused_onednn", "fused")
