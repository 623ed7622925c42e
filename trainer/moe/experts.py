"""Experts of one layer: E feed-forward networks with stacked weights."""

import torch
from torch import Tensor, nn

from trainer.ops.expert_ffn import Activation
from trainer.ops.kernels import ExpertsKernel, run_experts

# R rows, E_local experts here, D d_model, F d_ff, H width before the activation (2 F for swiglu).


class Experts(nn.Module):
    """E feed-forward networks without biases; dimension 0 of every parameter is the expert.

    Its input is rows grouped by expert: it depends neither on tokens, ranks nor combine weights.
    """

    def __init__(
        self, num_experts: int, d_model: int, d_ff: int, *, activation: Activation, kernel: ExpertsKernel
    ) -> None:
        super().__init__()
        self.num_experts, self.first = num_experts, 0
        """Experts of the whole layer, and the global index of the first local one."""
        width = 2 * d_ff if activation == "swiglu" else d_ff
        self.w_in = nn.Parameter(torch.empty(num_experts, width, d_model))  # (E, H, D)
        self.w_out = nn.Parameter(torch.empty(num_experts, d_model, d_ff))  # (E, D, F)
        for weight in self.parameters():  # as nn.Linear initializes each expert; free on the meta device
            bound = weight.shape[-1] ** -0.5
            nn.init.uniform_(weight, -bound, bound)
        self.activation, self.kernel = activation, kernel
        self.is_compiled = False
        """Compile the operations between the matrix products, if the kernel supports it."""

    def keep(self, first: int, end: int) -> None:
        """Keep only experts first .. end - 1."""
        self.first = first
        for name, weight in list(self.named_parameters()):
            setattr(self, name, nn.Parameter(weight.detach()[first:end].clone()))

    def forward(self, x: Tensor, rows_per_expert: Tensor, part: tuple[int, int] | None = None) -> Tensor:
        """Apply expert e to its rows of x (R, D); rows_per_expert sums to R.

        Args:
            x: grouped by expert.
            rows_per_expert: (E_local,), or of those in `part`.
            part: first and last + 1 of the local experts to apply; None: all.
        """
        w_in, w_out = self.w_in, self.w_out
        if part is not None:
            w_in, w_out = w_in[slice(*part)], w_out[slice(*part)]
        return run_experts(self.kernel, x, rows_per_expert, w_in, w_out, self.activation, is_compiled=self.is_compiled)
