"""Token choice: every token goes to the k experts that score best for it.

# T tokens, k experts per token, E experts, D d_model.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from trainer.moe.routers.registry import BiasBalancedRouterConfig, TopKRouterConfig
from trainer.moe.routing import Causality, Router, RouterOutput, RoutingContext, RoutingDecision
from trainer.ops.noise import uniform
from trainer.ops.select import first_top_k


class TopKRouter(Router):
    """Scores by softmax or sigmoid, keeps the k best, weighs by the normalised or raw scores.

    Source: Shazeer et al. 2017 (arXiv 1701.06538); sigmoid scores as in DeepSeek-V3 (arXiv 2412.19437), whose 1e-20 in
    the normalisation is left out: a sigmoid is never 0 in float32 unless its logit is below -100.
    """

    causal: ClassVar[Causality] = "strict"

    def __init__(
        self, config: TopKRouterConfig | BiasBalancedRouterConfig, *, d_model: int, num_experts: int, layer: int
    ) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.gate = nn.Linear(d_model, num_experts, bias=False)

    def forward(self, x: Tensor, context: RoutingContext) -> RouterOutput:
        """Route tokens x (T, D)."""
        logits = gate_logits(self.gate, self._jittered(x, context))  # (T, E)
        if self.config.score == "softmax":
            scores = probs = logits.softmax(-1)
        else:
            scores = logits.sigmoid()
            probs = scores / scores.sum(-1, keepdim=True)
        expert_index = first_top_k(self.selection_scores(scores.detach()), context.top_k or self.config.top_k)
        weight = scores.gather(-1, expert_index)  # (T, k)
        if self.config.normalize:
            weight = weight / weight.sum(-1, keepdim=True)
        decision = RoutingDecision.from_top_k(
            expert_index, weight * self.config.scale, num_experts=logits.shape[-1], valid=context.valid
        )
        return RouterOutput(decision=decision, logits=logits, probs=probs)

    def selection_scores(self, scores: Tensor) -> Tensor:
        """Return what experts are selected by, given their scores (T, E)."""
        return scores

    def _jittered(self, x: Tensor, context: RoutingContext) -> Tensor:
        """Multiply x by noise from [1 - jitter, 1 + jitter] (Switch Transformer, arXiv 2101.03961), while training."""
        if self.config.jitter == 0 or context.noise_key is None:
            return x
        noise = uniform(context.noise_key, x.shape[-1], salt=self.layer)  # (T, D)
        return x * (1 + self.config.jitter * (2 * noise - 1)).to(x.dtype)


def gate_logits(gate: nn.Linear, x: Tensor) -> Tensor:
    """Return logits (T, E) of tokens x (T, D) in float32, or float64 if x is; autocast does not reach the router."""
    with torch.autocast(x.device.type, enabled=False):
        return gate(x.to(gate.weight.dtype))
