"""Top-k of noisy logits, with a learned noise scale."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.moe.routers.top_k import TopKRouter, apply_jitter, gate_logits
from trainer.moe.routing import RouterOutput, RoutingContext
from trainer.ops.noise import standard_normal
from trainer.ops.select import stable_top_k

# T tokens, k experts per token, E experts, n null experts, D d_model.


class NoisyTopKRouter(TopKRouter):
    """Adds normal noise to the logits, scaled per token and expert by a second gate.

        H = x W_g + normal * (softplus(x W_noise) + 0.01)        weights: softmax over H, its k largest entries

    `load` is the probability that expert e is among the top k if only its own noise were drawn again: P(x, e) =
    Phi(((x W_g)_e - kth largest of the other entries of H) / noise scale of e). Unlike counts it has a gradient; the
    loss that balances it is `cv_squared.load_coef`.

    Source: Shazeer et al. 2017 (arXiv 1701.06538), eqs. 3 to 5 and 8 to 10; the 0.01, from their published code, keeps
        the division finite. Without noise (evaluation) this is `top_k` with softmax scores.
    """

    def __init__(self, *, d_model: int, **top_k_arguments: Any) -> None:
        super().__init__(d_model=d_model, **top_k_arguments)
        self.noise_gate = nn.Linear(d_model, self.num_experts + self.null_experts, bias=False)

    def forward(self, x: Tensor, context: RoutingContext) -> RouterOutput:
        """Route tokens x (T, D)."""
        if context.noise_key is None:
            return super().forward(x, context)
        x = apply_jitter(x, context, self.jitter, salt=self.layer)
        clean = self.logits(x)  # (T, E + n)
        scale = F.softplus(gate_logits(self.noise_gate, x)) + 0.01
        normal = standard_normal(context.noise_key, clean.shape[-1], salt=f"noisy_top_k {self.layer}")
        noisy = clean + normal.to(clean.dtype) * scale
        probs = noisy.softmax(-1)
        top_k = context.top_k or self.top_k
        live = stable_top_k(noisy.detach(), top_k)
        return RouterOutput(
            decision=self.decide(probs, context.chosen(live), context),
            logits=clean,
            probs=self.merge_null_columns(probs),
            scores=probs.detach(),
            load=_selection_probability(clean, noisy, scale, top_k)[:, : self.num_experts],
            live_choice=live,
        )


def _selection_probability(clean: Tensor, noisy: Tensor, scale: Tensor, top_k: int) -> Tensor:
    """Return (T, E): the probability that an entry is among the k largest when its own noise is drawn again."""
    if top_k >= clean.shape[-1]:
        return torch.ones_like(clean)
    best = noisy.topk(top_k + 1, dim=-1).values  # (T, k + 1)
    kth, next_one = best[:, -2:-1], best[:, -1:]
    # For an entry among the top k, the kth largest of the others is the (k + 1)th of all.
    threshold = torch.where(noisy >= kth, next_one, kth)
    return torch.special.ndtr((clean - threshold) / scale)
