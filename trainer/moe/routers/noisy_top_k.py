"""Top-k of noisy logits, with noise whose size is learned."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.moe.routers.config.token_choice import NoisyTopKRouterConfig
from trainer.moe.routers.top_k import TopKRouter, gate_logits, jittered
from trainer.moe.routing import RouterOutput, RoutingContext
from trainer.ops.noise import standard_normal
from trainer.ops.select import stable_top_k

# T tokens, k experts per token, E experts, n null experts, D d_model.


class NoisyTopKRouter(TopKRouter):
    """Adds normal noise to the logits, of a size that a second gate gives for each token and expert.

        H = x W_g + normal * (softplus(x W_noise) + 0.01)        weights: softmax of H, its k largest entries

    `load` is the probability that the expert is among the k if its own noise were drawn anew: P(x, e) = Phi((x W_g)_e
    less the k-th largest of the other entries of H, over the size of e's noise). It has a gradient where counts have
    none, and the loss that evens it out is `cv_squared.load_coef`.

    Source: Shazeer et al. 2017 (arXiv 1701.06538), eqs. 3 to 5 and 8 to 10. The 0.01 (from their published code) keeps
    the division finite. Without noise (evaluation) this is `top_k` with softmax scores.
    """

    def __init__(self, config: NoisyTopKRouterConfig, *, d_model: int, num_experts: int, layer: int) -> None:
        super().__init__(config, "softmax", d_model=d_model, num_experts=num_experts, layer=layer)
        self.noise_gate = nn.Linear(d_model, num_experts + config.null_experts, bias=False)

    def forward(self, x: Tensor, context: RoutingContext) -> RouterOutput:
        """Route tokens x (T, D)."""
        if context.noise_key is None:
            return super().forward(x, context)
        x = jittered(x, context, self.config.jitter, salt=self.layer)
        clean = self.logits(x)  # (T, E + n)
        size = F.softplus(gate_logits(self.noise_gate, x)) + 0.01
        normal = standard_normal(context.noise_key, clean.shape[-1], salt=f"noisy_top_k {self.layer}")
        noisy = clean + normal.to(clean.dtype) * size
        probs = noisy.softmax(-1)
        top_k = context.top_k or self.config.top_k
        return RouterOutput(
            decision=self.decide(probs, stable_top_k(noisy.detach(), top_k), context),
            logits=clean,
            probs=self.with_nulls_together(probs),
            scores=probs.detach(),
            load=_chance_to_be_chosen(clean, noisy, size, top_k)[:, : self.num_experts],
        )


def _chance_to_be_chosen(clean: Tensor, noisy: Tensor, size: Tensor, top_k: int) -> Tensor:
    """Return (T, E): the probability that an entry is among the k largest when its own noise is drawn anew."""
    if top_k >= clean.shape[-1]:
        return torch.ones_like(clean)
    best = noisy.topk(top_k + 1, dim=-1).values  # (T, k + 1)
    kth, next_one = best[:, -2:-1], best[:, -1:]
    # Without an entry that is among the k, the k-th largest of the others is the (k + 1)-th of all.
    threshold = torch.where(noisy >= kth, next_one, kth)
    return torch.special.ndtr((clean - threshold) / size)
