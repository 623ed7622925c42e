"""Choice of the experts' kernel, from a table of measurements and not by timing at run time.

A choice by timing could differ between two starts of a run, and with it the last bits of every sum: a resumed run
would no longer be bit-identical.
"""

from collections.abc import Callable
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from trainer.config.plugins import PluggableFunction
from trainer.ops import expert_ffn, fused_ffn
from trainer.ops.expert_ffn import Activation
from trainer.ops.fused_ffn import FusedParts

_MANY_ROWS = 512
"""Rows per expert from which its matrix products dominate the runtime."""

ExpertsKernel = Literal["loop", "padded", "grouped", "fused", "fused_onednn"]

_KERNELS = {"loop": expert_ffn.loop_ffn, "padded": expert_ffn.padded_ffn, "grouped": expert_ffn.grouped_ffn}


def run_experts(
    kernel: ExpertsKernel,
    x: Tensor,
    rows_per_expert: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    activation: Activation,
    *,
    is_compiled: bool = False,
) -> Tensor:
    """Run the named kernel; arguments and result as in `expert_ffn`.

    `is_compiled` compiles the activation of the fused kernels, once for all layers and sizes.
    """
    if kernel in ("fused", "fused_onednn"):
        parts = _fused_parts(kernel == "fused_onednn", is_compiled, x.device.type, x.dtype)
        return fused_ffn.fused(x, rows_per_expert, w_in, w_out, activation, parts)
    # After the cast, so that zeros are written in the narrower dtype. The fused kernels write zeros themselves.
    w_in, w_out = (expert_ffn.without_idle_gradients(w.to(x.dtype), rows_per_expert) for w in (w_in, w_out))
    run = _KERNELS.get(kernel) or _plugin_kernel(kernel)
    return run(x, rows_per_expert, w_in, w_out, activation)


@cache
def _plugin_kernel(name: str) -> Callable[..., Tensor]:
    """Return a kernel that is a plug-in: module:function, or the name of an entry point."""
    return PluggableFunction("experts_kernels").function(name)


@cache
def _fused_parts(onednn: bool, compiled: bool, device: str, dtype: torch.dtype) -> FusedParts:
    by_onednn = onednn and device == "cpu" and dtype is torch.float32
    forward, backward = expert_ffn.activate, fused_ffn.activate_backward
    if compiled:
        forward = torch.compile(forward, dynamic=True)
        backward = torch.compile(fused_ffn.activate_backward_to_compile, dynamic=True)
    return FusedParts(
        product=fused_ffn.onednn_product if by_onednn else fused_ffn.product,
        # torch uses oneDNN for bfloat16 too.
        rows_multiple=fused_ffn.ROWS_MULTIPLE if device == "cpu" and (by_onednn or dtype is torch.bfloat16) else 1,
        activate=forward,
        activate_backward=backward,
    )


def missing_kernel(kernel: str) -> str | None:
    """Return the message about a kernel that this build of torch does not have; None if it has it."""
    if kernel != "fused_onednn" or fused_ffn.has_onednn_product():
        return None
    return "fused_onednn is not in this build of torch; use fused"


def choose_experts_kernel(
    device: str, dtype: torch.dtype, *, cpu_vendor: str, rows_per_expert: int, d_model: int, d_ff: int
) -> ExpertsKernel:
    """Return the kernel for `experts_kernel: auto`; the measurements are in docs/benchmarks.md.

    `dtype` is that of the matrix products, and `rows_per_expert` at a uniform load.
    """
    # grouped_mm needs rows of a multiple of 16 bytes.
    can_group = all(width * dtype.itemsize % 16 == 0 for width in (d_model, d_ff))
    if device == "cuda":
        return "grouped" if dtype is torch.bfloat16 and can_group else "loop"
    if dtype is not torch.float32:
        return "fused"
    if rows_per_expert < _MANY_ROWS:
        return "grouped" if can_group else "fused"
    # MKL is tuned for Intel processors; on others oneDNN is faster in float32.
    return "fused_onednn" if cpu_vendor != "GenuineIntel" and fused_ffn.has_onednn_product() else "fused"
