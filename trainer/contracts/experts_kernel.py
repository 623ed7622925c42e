"""Contract of an experts kernel: the numbers and gradients of the oracle, on the cases of the kernel canary."""

from functools import partial

import torch
from torch import Tensor

from trainer.contracts.ensure import ensure
from trainer.ops.activations import ACTIVATIONS, Activation
from trainer.ops.expert_order import order_by_expert
from trainer.ops.kernel_canary import GROUPS, NO_ROWS, ONE_TAKES_ALL, RowGroups, groups_fault
from trainer.ops.kernels import RowsKernel, run_rows_kernel
from trainer.ops.layer_widths import LayerWidths

_D, _F = 8, 16


def rows_equal_the_loop(kernel: RowsKernel) -> None:
    """Outputs and gradients are those of a loop over the experts, for groups of any size."""
    _check(kernel, GROUPS)


def idle_experts_equal_the_loop(kernel: RowsKernel) -> None:
    """Experts without rows change nothing, also if one takes all."""
    _check(kernel, ONE_TAKES_ALL)


def no_rows_equal_the_loop(kernel: RowsKernel) -> None:
    """A rank without rows gets an empty output."""
    _check(kernel, NO_ROWS)


CHECKS = [rows_equal_the_loop, idle_experts_equal_the_loop, no_rows_equal_the_loop]


def _check(kernel: RowsKernel, groups: RowGroups) -> None:
    for activation in ACTIVATIONS:
        widths = LayerWidths(d_model=_D, d_ff=_F, activation=activation, dtype=torch.float32)
        for seed in range(2):  # the second time with other values: no buffer may keep the first
            fault = groups_fault(partial(_run, kernel), groups, widths, torch.device("cpu"), seed=seed)
            ensure(fault is None, f"{activation}: {fault}")


def _run(
    kernel: RowsKernel,
    x: Tensor,
    expert_index: Tensor,
    weight: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    activation: Activation,
) -> Tensor:
    order = order_by_expert(expert_index, len(w_in))
    return run_rows_kernel(kernel, x, weight, order, w_in, w_out, activation)
