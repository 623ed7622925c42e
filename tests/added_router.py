"""A router that a user adds: one class, one config class, nothing else."""

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from trainer.moe.routers.config.options import RouterOptions
from trainer.moe.routing import Causality, Router, RouterOutput, RoutingContext, RoutingDecision
from trainer.ops.select import stable_top_k


class ThresholdRouterConfig(RouterOptions):
    """Every expert whose sigmoid is over a threshold, and the best one in any case."""

    kind: Literal["threshold"] = "threshold"
    threshold: float = 0.6

    def build(self, *, d_model: int, num_experts: int, layer: int) -> Router:
        return ThresholdRouter(self, d_model=d_model, num_experts=num_experts)


class ThresholdRouter(Router):
    causal: ClassVar[Causality] = "strict"

    def __init__(self, config: ThresholdRouterConfig, *, d_model: int, num_experts: int) -> None:
        super().__init__()
        self.threshold = config.threshold
        self.gate = nn.Linear(d_model, num_experts, bias=False)

    def forward(self, x: Tensor, context: RoutingContext) -> RouterOutput:
        with torch.autocast(x.device.type, enabled=False):
            logits = self.gate(x.to(self.gate.weight.dtype))
        scores = logits.sigmoid()
        chosen = (scores > self.threshold).scatter(-1, stable_top_k(scores.detach(), 1), True)
        decision = RoutingDecision.from_mask(chosen, scores, valid=context.valid)
        return RouterOutput(decision=decision, logits=logits, probs=scores / scores.sum(-1, keepdim=True))
