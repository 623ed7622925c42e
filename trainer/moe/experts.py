"""The experts of one layer: E feed-forward networks as stacked weights."""

import torch
from torch import Tensor, nn

from trainer.ops.expert_ffn import Activation
from trainer.ops.kernels import ExpertsKernel, run_experts

# R rows, E_local experts here, D d_model, F d_ff, H width before the activation (2 F for swiglu).


class Experts(nn.Module):
    """E feed-forward networks without biases; dimension 0 of every parameter is the expert.

    Sees rows grouped by expert and nothing else: no ids, no ranks, no weights.
    """

    def __init__(
        self, num_experts: int, d_model: int, d_ff: int, *, activation: Activation, kernel: ExpertsKernel
    ) -> None:
        super().__init__()
        self.num_experts, self.first = num_experts, 0
        """How many experts the layer has, and the global number of the first one that is here."""
        width = 2 * d_ff if activation == "swiglu" else d_ff
        self.w_in = nn.Parameter(torch.empty(num_experts, width, d_model))  # (E, H, D)
        self.w_out = nn.Parameter(torch.empty(num_experts, d_model, d_ff))  # (E, D, F)
        for weight in self.parameters():  # each expert as nn.Linear would start; on meta it costs nothing
            bound = weight.shape[-1] ** -0.5
            nn.init.uniform_(weight, -bound, bound)
        self.activation, self.kernel = activation, kernel
        self.is_compiled = False
        """Compile what runs between the products, where the kernel can."""

    def keep(self, first: int, end: int) -> None:
        """Hold experts first .. end - 1 only."""
        self.first = first
        for name, weight in list(self.named_parameters()):
            setattr(self, name, nn.Parameter(weight.detach()[first:end].clone()))

    def forward(self, x: Tensor, rows_per_expert: Tensor, part: tuple[int, int] | None = None) -> Tensor:
        """Apply expert e to its rows of x (R, D); rows_per_expert sums to R.

        Args:
            x: grouped by expert.
            rows_per_expert: (E_local,), or of those in `part`.
            part: first and last + 1 of the experts here that are to be applied; None: all.
        """
        w_in, w_out = self.w_in, self.w_out
        if part is not None:
            w_in, w_out = w_in[slice(*part)], w_out[slice(*part)]
        return run_experts(self.kernel, x, rows_per_expert, w_in, w_out, self.activation, is_compiled=self.is_compiled)
