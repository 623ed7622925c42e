"""Top-p routing: the most probable experts of a token, until their probabilities add up to p."""

import torch
from torch import Tensor, nn

from trainer.moe.routers.top_k import apply_jitter, gate_logits
from trainer.moe.routing import Router, RouterOutput, RoutingContext, RoutingDecision

# T tokens, E experts, D d_model.


class TopPRouter(Router):
    """Selects the smallest set of experts whose probabilities add up to p; ties are broken in expert order.

    Uncertain tokens use many experts, confident tokens few. Without a cost all tokens would become uncertain, so the
    router's own loss is sparsity_coef times the entropy of its probabilities.

    Source: Huang et al. 2024 (arXiv 2403.07652).
    """

    def __init__(
        self,
        *,
        d_model: int,
        num_experts: int,
        layer: int,
        p: float,
        max_experts: int | None,
        normalize: bool,
        sparsity_coef: float,
        jitter: float,
    ) -> None:
        super().__init__()
        self.layer, self.p, self.max_experts = layer, p, max_experts or num_experts
        self.normalize, self.sparsity_coef, self.jitter = normalize, sparsity_coef, jitter
        self.gate = nn.Linear(d_model, num_experts, bias=False)

    def forward(self, x: Tensor, context: RoutingContext) -> RouterOutput:
        """Route tokens x (T, D)."""
        logits = gate_logits(self.gate, apply_jitter(x, context, self.jitter, salt=self.layer))  # (T, E)
        log_probs = logits.log_softmax(-1)
        probs = log_probs.exp()
        chosen = nucleus(probs.detach(), self.p, self.max_experts)
        weight = probs / (probs * chosen).sum(-1, keepdim=True) if self.normalize else probs  # the sum is >= 1 / E
        return RouterOutput(
            decision=RoutingDecision.from_mask(chosen, weight, valid=context.valid),
            logits=logits,
            probs=probs,
            # log_softmax, not probs.log(), whose gradient is NaN where a probability underflows to 0.
            loss=-self.sparsity_coef * (probs * log_probs).sum(-1) if self.sparsity_coef else None,
        )


def nucleus(probs: Tensor, p: float, max_experts: int) -> Tensor:
    """Return (T, E) bool: the fewest, most probable entries of probs (T, E) that add up to p; at most `max_experts`."""
    ordered, order = probs.sort(dim=-1, descending=True, stable=True)
    # Probability mass from each entry to the end: summed from its small end it is exact to its last bit. As 1 minus a
    # sum that rounds to 1 it would be rounding error alone, which for p = 1 would select among all that is left.
    remaining = ordered.flip(-1).cumsum(-1).flip(-1)
    taken = remaining > 1 - p
    taken[:, max_experts:] = False
    taken[:, 0] = True
    return torch.zeros_like(taken).scatter(-1, order, taken)
