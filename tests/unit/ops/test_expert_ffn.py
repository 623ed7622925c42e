"""Every experts kernel computes what the loop computes, on awkward group sizes."""

import pytest
import torch

from trainer.ops.expert_ffn import Activation
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


def _run(kernel: ExpertsKernel, rows: list[int], dtype: torch.dtype, activation: Activation) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    width = 2 * D_FF if activation == "swiglu" else D_FF
    weights = torch.float64 if dtype is torch.float64 else torch.float32
    x = torch.randn(sum(rows), D_MODEL, generator=generator).to(dtype).requires_grad_()
    w_in = torch.randn(len(rows), width, D_MODEL, generator=generator).mul(0.3).to(weights).requires_grad_()
    w_out = torch.randn(len(rows), D_MODEL, D_FF, generator=generator).mul(0.3).to(weights).requires_grad_()
    y = run_experts(kernel, x, torch.tensor(rows), w_in, w_out, activation)
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
        # bfloat16 keeps 8 bits: sums of up to 130 rows of size about 5 differ in the last of them
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
