"""Top-p router: a token's likeliest experts, until they hold the probability p."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from trainer.moe.routers.config.token_choice import TopPRouterConfig
from trainer.moe.routers.top_k import gate_logits, jittered
from trainer.moe.routing import Causality, Router, RouterOutput, RoutingContext, RoutingDecision

# T tokens, E experts, D d_model.


class TopPRouter(Router):
    """Takes the smallest set of likeliest experts whose probabilities add up to p; equal ones in expert order.

    An unsure token takes many experts and a sure one few. Without a price they would all become unsure, so the loss of
    the router is sparsity_coef times the entropy of its probabilities.

    Source: Huang et al. 2024 (arXiv 2403.07652).
    """

    causal: ClassVar[Causality] = "strict"

    def __init__(self, config: TopPRouterConfig, *, d_model: int, num_experts: int, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.gate = nn.Linear(d_model, num_experts, bias=False)

    def forward(self, x: Tensor, context: RoutingContext) -> RouterOutput:
        """Route tokens x (T, D)."""
        logits = gate_logits(self.gate, jittered(x, context, self.config.jitter, salt=self.layer))  # (T, E)
        log_probs = logits.log_softmax(-1)
        probs = log_probs.exp()
        at_most = self.config.max_experts or probs.shape[-1]
        chosen = likeliest(probs.detach(), self.config.p, at_most)
        weight = probs / (probs * chosen).sum(-1, keepdim=True) if self.config.normalize else probs  # at least 1 / E
        return RouterOutput(
            decision=RoutingDecision.from_mask(chosen, weight, valid=context.valid),
            logits=logits,
            probs=probs,
            # Not by the probabilities' logarithm, whose gradient is NaN where one of them is 0 in float32.
            loss=-self.config.sparsity_coef * (probs * log_probs).sum(-1) if self.config.sparsity_coef else None,
        )


def likeliest(probs: Tensor, p: float, at_most: int) -> Tensor:
    """Return (T, E) bool: the fewest entries of probs (T, E), likeliest first, that add up to p, or `at_most`."""
    ordered, order = probs.sort(dim=-1, descending=True, stable=True)
    # What the ones ahead lack of 1: added up from its small end it is exact to its own last bit. As 1 less a sum that
    # rounds to 1 it would be rounding alone, which for p = 1 would decide about all that is left.
    lacking = ordered.flip(-1).cumsum(-1).flip(-1)
    taken = lacking > 1 - p
    taken[:, at_most:] = False
    taken[:, 0] = True
    return torch.zeros_like(taken).scatter(-1, order, taken)
