"""Experts of one layer: E feed-forward networks with stacked weights."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from trainer.ops.activations import Activation, hidden_width
from trainer.ops.expert_ffn import ExpertBiases
from trainer.ops.kernels import ExpertsKernel, run_experts
from trainer.ops.low_rank import ExpertAdapters, LowRank

# N tokens, k slots per token, D d_model, F d_ff, H width before the activation (2 F with a gate).


class Experts(nn.Module):
    """E feed-forward networks, with or without biases; dimension 0 of every parameter is the expert."""

    def __init__(
        self,
        num_experts: int,
        d_model: int,
        d_ff: int,
        *,
        activation: Activation,
        kernel: ExpertsKernel,
        has_bias: bool = False,
    ) -> None:
        super().__init__()
        self.num_experts, self.numbers = num_experts, tuple(range(num_experts))
        """Experts of the whole layer, and the global index of each local one."""
        width = hidden_width(d_ff, activation)
        self.w_in = nn.Parameter(torch.empty(num_experts, width, d_model))  # (E, H, D)
        self.w_out = nn.Parameter(torch.empty(num_experts, d_model, d_ff))  # (E, D, F)
        self.w_in_bias = nn.Parameter(torch.empty(num_experts, width)) if has_bias else None  # (E, H)
        self.w_out_bias = nn.Parameter(torch.empty(num_experts, d_model)) if has_bias else None  # (E, D)
        for name, weight in self.named_parameters():  # as nn.Linear initializes each expert; free on the meta device
            bound = (d_model if name.startswith("w_in") else d_ff) ** -0.5
            nn.init.uniform_(weight, -bound, bound)
        self.lora_scales: dict[str, float] = {}
        """Scale s of each adapted weight, w_in or w_out, which becomes W + s B A."""
        self.activation, self.kernel = activation, kernel
        self.is_compiled = False
        """Compile the operations between the matrix products, if the kernel supports it."""
        self.recompute = False
        """Compute the hidden values again in the backward pass instead of saving them."""

    def add_adapter(self, name: str, rank: int, scale: float) -> None:
        """Give every expert's `name`, w_in or w_out, a low-rank addition: factors (E, r, K) and (E, N, r)."""
        weight, self.lora_scales[name] = getattr(self, name), scale
        num_experts, rows, columns = weight.shape
        a, b = weight.new_empty(num_experts, rank, columns), weight.new_zeros(num_experts, rows, rank)
        nn.init.uniform_(a, -(columns**-0.5), columns**-0.5)
        self.register_parameter(f"{name}_lora_a", nn.Parameter(a))
        self.register_parameter(f"{name}_lora_b", nn.Parameter(b))

    def matrices(self) -> list[tuple[Tensor, tuple[Tensor, Tensor] | None]]:
        """Return both weights, with the factors of their additions; None without one."""
        weights = dict(self.named_parameters())
        found = ((weights[name], self._adapter(name, weights)) for name in ("w_in", "w_out"))
        return [(weight, None if low is None else (low.a, low.b)) for weight, low in found]

    def keep(self, numbers: Sequence[int]) -> None:
        """Keep only these experts of the layer, in this order."""
        self.numbers = tuple(numbers)
        for name, weight in list(self.named_parameters()):
            setattr(self, name, nn.Parameter(weight.detach()[list(numbers)], weight.requires_grad))

    def forward(
        self,
        x: Tensor,
        expert_index: Tensor,
        weight: Tensor,
        *,
        num_rows: int | None = None,
        part: tuple[int, int] | None = None,
        copies: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Return for each token of x (N, D) the weighted sum of its experts' outputs, in slot order.

        Args:
            x: (N, D).
            expert_index: (N, k) int64 number of a local expert, or of one in `part`; their number or more: none.
            weight: (N, k) combine weights, at least float32.
            num_rows: number of experts that the tokens have here; None: it is counted, which waits for the device.
            part: first and last + 1 of the local experts to apply; None: all.
            copies: weights of further experts, by name, numbered after the local ones. Their outputs are added to the
                sums of these.

        Returns:
            (N, D) in the wider dtype of the products and of weight; in that of the products if k is 1, where nothing is
            summed.
        """
        own = dict(self.named_parameters(recurse=False))
        if copies is None:
            cut = own if part is None else {name: weights[slice(*part)] for name, weights in own.items()}
            return self._run(cut, x, expert_index, weight, num_rows)
        num_own, num_copies = len(self.w_in), len(copies["w_in"])
        first, end = part or (0, num_own + num_copies)
        cut = {name: weights[min(first, num_own) : min(end, num_own)] for name, weights in own.items()}
        more = {name: weights[max(0, first - num_own) : max(0, end - num_own)] for name, weights in copies.items()}
        num_own, num_copies = len(cut["w_in"]), len(more["w_in"])
        index_of_copy = torch.where(expert_index < num_own, num_copies, expert_index - num_own)
        sums = [
            self._run(weights, x, index, weight, None)
            for weights, index in ((cut, expert_index), (more, index_of_copy))
            if len(weights["w_in"])
        ]
        return sums[0] if len(sums) == 1 else sums[0] + sums[1]

    def _run(
        self, weights: Mapping[str, Tensor], x: Tensor, expert_index: Tensor, weight: Tensor, num_rows: int | None
    ) -> Tensor:
        """Apply the experts that have these weights, by name."""
        b_in, b_out = weights.get("w_in_bias"), weights.get("w_out_bias")
        adapters = None
        if self.lora_scales:
            adapters = ExpertAdapters(self._adapter("w_in", weights), self._adapter("w_out", weights))
        return run_experts(
            self.kernel,
            x,
            expert_index,
            weight,
            weights["w_in"],
            weights["w_out"],
            self.activation,
            biases=None if b_in is None or b_out is None else ExpertBiases(b_in, b_out),
            adapters=adapters,
            num_rows=num_rows,
            is_compiled=self.is_compiled,
            recompute=self.recompute,
        )

    def _adapter(self, name: str, weights: Mapping[str, Tensor]) -> LowRank | None:
        if name not in self.lora_scales:
            return None
        return LowRank(weights[f"{name}_lora_a"], weights[f"{name}_lora_b"], self.lora_scales[name])
