"""Which of the equal ways to multiply the experts is used where: a table of measurements, never a timing at run time.

A choice that is timed when the run starts differs between two starts of one run, and with it the last bits of every sum, so a
resumed run would no longer be the run it continues.
"""

from typing import Literal

import torch
from torch import Tensor

from trainer.ops import expert_ffn, fused_ffn
from trainer.ops.expert_ffn import Activation

ExpertsKernel = Literal["loop", "padded", "grouped", "fused"]

_KERNELS = {
    "loop": expert_ffn.loop,
    "padded": expert_ffn.padded,
    "grouped": expert_ffn.grouped,
    "fused": fused_ffn.fused,
}


def run_experts(
    kernel: ExpertsKernel, x: Tensor, rows_per_expert: Tensor, w_in: Tensor, w_out: Tensor, activation: Activation
) -> Tensor:
    """Run the named kernel; arguments and result as in `expert_ffn`."""
    return _KERNELS[kernel](x, rows_per_expert, w_in, w_out, activation)


def choose_experts_kernel(device: str, dtype: torch.dtype, *, num_experts: int, d_ff: int) -> ExpertsKernel:
    """Return what `experts_kernel: auto` means for a device type, compute dtype and shape of one expert."""
    if device == "cpu":
        return "fused"
    # grouped_mm wants rows of 16 bytes and has no float64.
    aligned = d_ff * dtype.itemsize % 16 == 0
    return "grouped" if dtype is torch.bfloat16 and aligned else "loop"
