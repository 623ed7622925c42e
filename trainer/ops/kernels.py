"""Choice of the experts' kernel, from a table of measurements and not by timing at run time.

A choice by timing could differ between two starts of a run, and with it the last bits of every sum: a resumed run
would no longer be bit-identical.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Literal, get_args

import torch
from torch import Tensor

from trainer import packages
from trainer.config.plugins import PluggableFunction
from trainer.ops import fused_ffn
from trainer.ops.activations import Activation
from trainer.ops.compute_dtype import compute_dtype
from trainer.ops.expert_ffn import ExpertBiases
from trainer.ops.expert_order import ExpertOrder, order_by_expert
from trainer.ops.ffn_kernel import FFNKernel
from trainer.ops.fused_ffn import FusedKernel
from trainer.ops.grouped_kernel import GroupedKernel, GroupedMM, LoopProducts, PaddedProducts
from trainer.ops.lora_kernels import LORA_KERNELS
from trainer.ops.low_rank import ExpertAdapters
from trainer.ops.mx_format import BLOCK
from trainer.ops.mxfp8_products import GROUP_ROWS, EmulatedMXFP8Products, MXFP8Products
from trainer.ops.package_experts import PACKAGE_EXPERTS
from trainer.ops.permute import gather_rows, sum_rows
from trainer.ops.routed_ffn import routed_ffn
from trainer.ops.weighted_activation import weighted_activation

_MANY_ROWS = 512
"""Rows per expert from which its matrix products dominate the runtime."""
_FEW_WEIGHTS = 8192
"""d_model * d_ff below which oneDNN, which rearranges the operands of each product first, is slower than MKL."""
_MXFP8_CAPABILITY = (10, 0)
"""Compute capability for which torch has a grouped product of MXFP8."""
_ALIGNMENT_BYTES = 16
"""The grouped product reads weight gradients along the rows, in units of this."""

ExpertsKernel = Literal[
    "loop", "padded", "grouped", "fused", "fused_onednn", "triton", "mxfp8", "sonicmoe", "scattermoe"
]
RowsKernel = Callable[[Tensor, Tensor, Tensor, Tensor, Activation], Tensor]
"""Kernel that is a plug-in, with the arguments of `trainer.ops.expert_ffn.loop_ffn`."""

_PRODUCTS = {"loop": LoopProducts, "padded": PaddedProducts, "grouped": GroupedMM}


def run_experts(
    kernel: ExpertsKernel,
    x: Tensor,
    expert_index: Tensor,
    weight: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    activation: Activation,
    *,
    biases: ExpertBiases | None = None,
    adapters: ExpertAdapters | None = None,
    num_rows: int | None = None,
    is_compiled: bool = False,
    recompute: bool = False,
) -> Tensor:
    """Return for each token the weighted sum of its experts' outputs (N, D), by the named kernel.

    Args:
        kernel: a name, or module:function of a plug-in.
        x: (N, D).
        expert_index: (N, k) int64; E or more for none.
        weight: (N, k) combine weights, at least float32.
        w_in: (E, H, D).
        w_out: (E, D, F).
        activation: between the two products.
        biases: of the two products; not for kernels of other packages and plug-ins.
        adapters: low-rank additions to w_in and w_out; for the kernels in `LORA_KERNELS`.
        num_rows: number of (token, expert) pairs; None: it is counted, which waits for the device.
        is_compiled: compile the activation, once for all layers and sizes.
        recompute: save only x, and compute the hidden values again in the backward pass. Kernels of other packages, and
            plug-ins, save what they like.

    Returns:
        In the wider dtype of the products and of weight; in that of the products if k is 1, where nothing is summed.
    """
    if biases is not None and (kernel not in get_args(ExpertsKernel) or kernel in PACKAGE_EXPERTS):
        raise TypeError(f"the experts' kernel {kernel} has no biases; use a built-in one, such as loop")
    if adapters is not None and kernel not in LORA_KERNELS:
        raise TypeError(f"the experts' kernel {kernel} has no LoRA; use one of {', '.join(LORA_KERNELS)}")
    if kernel not in get_args(ExpertsKernel):
        order = order_by_expert(expert_index, len(w_in), num_rows=num_rows)
        return run_rows_kernel(_plugin_kernel(kernel), x.to(compute_dtype(x)), weight, order, w_in, w_out, activation)
    dtype = compute_dtype(x)
    multiple = _rows_multiple(kernel, x.device.type, dtype)
    order = order_by_expert(expert_index, len(w_in), num_rows=num_rows, multiple=multiple)
    if kernel in PACKAGE_EXPERTS and len(order.slot_of_row):
        y = PACKAGE_EXPERTS[kernel](x.to(dtype), expert_index, weight, order, w_in, w_out, activation)
        return y.to(torch.promote_types(dtype, weight.dtype) if weight.shape[1] > 1 else dtype)
    run = _built(kernel, activation, is_compiled, x.device.type, dtype)
    return routed_ffn(
        x, weight, order, w_in, w_out, run, dtype=dtype, biases=biases, adapters=adapters, recompute=recompute
    )


def run_rows_kernel(
    kernel: RowsKernel,
    x: Tensor,
    weight: Tensor,
    order: ExpertOrder,
    w_in: Tensor,
    w_out: Tensor,
    activation: Activation,
) -> Tensor:
    """Run a kernel that is a plug-in, in plain autograd: it computes rows, and saves what it likes."""
    y = kernel(gather_rows(x, order), order.rows_per_expert, w_in.to(x.dtype), w_out.to(x.dtype), activation)
    scale = order.of_rows(weight)
    wide = torch.promote_types(x.dtype, weight.dtype) if weight.shape[1] > 1 else x.dtype
    return sum_rows((y * scale[:, None]).to(x.dtype), order, dtype=wide)


@cache
def _plugin_kernel(name: str) -> RowsKernel:
    """Return a kernel that is a plug-in: module:function, or the name of an entry point."""
    return PluggableFunction("experts_kernels").function(name)


@cache
def _built(kernel: str, activation: Activation, is_compiled: bool, device: str, dtype: torch.dtype) -> FFNKernel:
    between = weighted_activation(activation, is_compiled=is_compiled)
    if kernel in _PRODUCTS:
        return GroupedKernel(between, _PRODUCTS[kernel])
    if kernel == "mxfp8":
        return GroupedKernel(between, MXFP8Products if device == "cuda" else EmulatedMXFP8Products)
    if kernel == "triton":
        from trainer.ops.triton_ffn import TritonKernel  # an optional package

        return TritonKernel(between)
    by_onednn = kernel == "fused_onednn" and device == "cpu" and dtype is torch.float32
    # torch uses oneDNN for bfloat16 too.
    is_padded = device == "cpu" and (by_onednn or dtype is torch.bfloat16)
    products = fused_ffn.OneDNNProducts() if by_onednn else fused_ffn.Products()
    return FusedKernel(between, products, fused_ffn.ROWS_MULTIPLE if is_padded else 1)


def _rows_multiple(kernel: str, device: str, dtype: torch.dtype) -> int:
    """Return what the rows of each expert are padded to a multiple of."""
    if kernel == "mxfp8":
        return GROUP_ROWS if device == "cuda" else BLOCK
    return _ALIGNMENT_BYTES // dtype.itemsize if kernel == "grouped" and dtype is torch.bfloat16 else 1


def emulation_of(kernel: str) -> Callable[..., Tensor] | None:
    """Return what a kernel in a coarser format is compared with: itself, emulated on the host; None for all others."""
    return partial(run_experts, "mxfp8") if kernel == "mxfp8" else None


def fallback_kernels(kernel: str, device: str) -> list[str]:
    """Return the kernels that take the place of one that is wrong on a device, the fastest first."""
    order = ["fused", "loop"] if device == "cpu" else ["loop"]
    return order[order.index(kernel) + 1 :] if kernel in order else order


def missing_kernel(kernel: str, device: str = "cuda", *, instead: str = "auto") -> str | None:
    """Return the message about a kernel that is not installed or does not run on a device; None if it does.

    It advises the kernel `instead`.
    """
    if kernel == "fused_onednn" and not fused_ffn.has_onednn_product():
        return "fused_onednn is not in this build of torch; use fused"
    if kernel == "mxfp8" and device == "cuda" and torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        if (major, minor) == _MXFP8_CAPABILITY:
            return None
        needed = ".".join(map(str, _MXFP8_CAPABILITY))
        return f"mxfp8 needs a GPU of compute capability {needed}, and this one has {major}.{minor}; use {instead}"
    if kernel not in ("triton", *PACKAGE_EXPERTS):
        return None
    if not packages.is_installed(kernel):
        return packages.missing(kernel, user=kernel) + f", or use {instead}"
    if device == "cuda":
        return None
    if kernel != "triton":
        return f"{kernel} needs a GPU, and the device is {device}; use {instead}"
    from trainer.ops.triton_ffn import IS_INTERPRETED  # an optional package

    test = "TRITON_INTERPRET=1 to test it, very slowly"
    return None if IS_INTERPRETED else f"triton needs a GPU, and the device is {device}; use {instead}, or {test}"


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
    by_onednn = cpu_vendor != "GenuineIntel" and fused_ffn.has_onednn_product() and d_model * d_ff >= _FEW_WEIGHTS
    return "fused_onednn" if by_onednn else "fused"
