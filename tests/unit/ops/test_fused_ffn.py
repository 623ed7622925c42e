"""The fused kernel makes few operations for an expert: of small models they take more time than the products."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.ops.kernels import ExpertsKernel, run_experts


class _Counter(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def _operations(num_experts: int, kernel: ExpertsKernel) -> int:
    """Return those of forward and backward, with as many rows for every expert."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(64, 8, generator=generator), torch.rand(64, 1, generator=generator)
    index = torch.arange(64)[:, None] % num_experts
    w_in, w_out = torch.randn(num_experts, 24, 8), torch.randn(num_experts, 8, 12)
    inputs = x, weight, w_in, w_out = [tensor.requires_grad_() for tensor in (x, weight, w_in, w_out)]
    with _Counter() as counter:
        y = run_experts(kernel, x, index, weight, w_in, w_out, "swiglu", num_rows=64)
        torch.autograd.grad(y.sum(), inputs)
    return counter.count


def test_an_expert_more_costs_few_operations() -> None:
    """Six products; gathers, views, activation and its gradients; by oneDNN a copy of each product."""
    bounds: dict[ExpertsKernel, int] = {"fused": 46, "fused_onednn": 52}
    for kernel, most in bounds.items():
        assert (_operations(8, kernel) - _operations(4, kernel)) / 4 <= most, kernel
