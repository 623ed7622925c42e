"""Token choice: every token goes to the k experts that score best for it.

# T tokens, k experts per token, E experts, n null experts, D d_model.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from trainer.moe.routers.config.options import Score, TopKOptions
from trainer.moe.routing import Causality, Router, RouterOutput, RoutingContext, RoutingDecision
from trainer.ops.noise import uniform
from trainer.ops.select import stable_top_k


class TopKRouter(Router):
    """Scores by softmax or sigmoid, keeps the k best, weighs by the normalised or raw scores.

    Scores that are 0 in float32 (a sigmoid below -88) add up to 0; what is divided by such a sum stays 0.

    Source: Shazeer et al. 2017 (arXiv 1701.06538); sigmoid scores as in DeepSeek-V3 (arXiv 2412.19437); null experts as
    the zero experts of MoE++ (arXiv 2410.07348).
    """

    causal: ClassVar[Causality] = "strict"

    def __init__(self, config: TopKOptions, score: Score, *, d_model: int, num_experts: int, layer: int) -> None:
        super().__init__()
        self.config, self.score, self.layer, self.num_experts = config, score, layer, num_experts
        self.make_gate(d_model, num_experts + config.null_experts)

    def make_gate(self, d_model: int, num_columns: int) -> None:
        """Make what logits are computed with."""
        self.gate = nn.Linear(d_model, num_columns, bias=False)

    def forward(self, x: Tensor, context: RoutingContext) -> RouterOutput:
        """Route tokens x (T, D)."""
        logits = self.logits(jittered(x, context, self.config.jitter, salt=self.layer))  # (T, E + n)
        scores, probs = scores_of(logits, self.score)
        expert_index = stable_top_k(self.selection_scores(scores.detach()), context.top_k or self.config.top_k)
        return RouterOutput(
            decision=self.decide(scores, expert_index, context),
            logits=logits,
            probs=self.with_nulls_together(probs),
            scores=scores.detach(),
        )

    def logits(self, x: Tensor) -> Tensor:
        """Return logits (T, E + n) of tokens x (T, D), in at least float32."""
        return gate_logits(self.gate, x)

    def selection_scores(self, scores: Tensor) -> Tensor:
        """Return what experts are selected by, given their scores (T, E + n)."""
        return scores

    def decide(self, scores: Tensor, expert_index: Tensor, context: RoutingContext) -> RoutingDecision:
        """Weigh the selected experts (T, k) by their scores (T, E + n)."""
        weight = scores.gather(-1, expert_index)  # (T, k)
        if self.config.normalize:
            weight = normalized(weight)
        return RoutingDecision.from_top_k(
            expert_index, weight * self.config.scale, num_experts=self.num_experts, valid=context.valid
        )

    def with_nulls_together(self, probs: Tensor) -> Tensor:
        """Return probabilities (T, E + 1), the last one of all null experts; (T, E) where there are none."""
        if self.config.null_experts == 0:
            return probs
        real, null = probs.split([self.num_experts, self.config.null_experts], dim=-1)
        return torch.cat([real, null.sum(-1, keepdim=True)], dim=-1)


def gate_logits(gate: nn.Linear, x: Tensor) -> Tensor:
    """Return logits (T, E) of tokens x (T, D) in float32, or float64 if x is; autocast does not reach the router."""
    with torch.autocast(x.device.type, enabled=False):
        return gate(x.to(gate.weight.dtype))


def scores_of(logits: Tensor, score: Score) -> tuple[Tensor, Tensor]:
    """Return scores (T, E), and the same made to sum to 1."""
    if score == "softmax":
        probs = logits.softmax(-1)
        return probs, probs
    scores = logits.sigmoid()
    return scores, normalized(scores)


def normalized(scores: Tensor) -> Tensor:
    """Return scores (T, n) divided by their sum; all 0 where that is 0."""
    return scores / scores.sum(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)


def jittered(x: Tensor, context: RoutingContext, jitter: float, *, salt: int) -> Tensor:
    """Multiply x by noise from [1 - jitter, 1 + jitter] (Switch Transformer, arXiv 2101.03961), while training."""
    if jitter == 0 or context.noise_key is None:
        return x
    noise = uniform(context.noise_key, x.shape[-1], salt=salt).to(torch.promote_types(x.dtype, torch.float32))  # (T, D)
    return x * (1 + jitter * (2 * noise - 1)).to(x.dtype)
