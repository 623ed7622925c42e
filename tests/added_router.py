"""A user-defined router: one router class and one config class."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from trainer.moe.routers.config.options import RouterOptions
from trainer.moe.routing import Causality, Router, RouterOutput, RoutingContext, RoutingDecision
from trainer.ops.select import stable_top_k


class ThresholdRouterConfig(RouterOptions):
    """Every expert whose sigmoid score exceeds a threshold, and always the best one."""

    threshold: float = 0.6

    def build(self, *, d_model: int, num_experts: int, layer: int) -> Router:
        return ThresholdRouter(d_model=d_model, num_experts=num_experts, threshold=self.threshold)


class ThresholdRouter(Router):
    causal: ClassVar[Causality] = "strict"

    def __init__(self, *, d_model: int, num_experts: int, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold
        self.gate = nn.Linear(d_model, num_experts, bias=False)

    def forward(self, x: Tensor, context: RoutingContext) -> RouterOutput:
        with torch.autocast(x.device.type, enabled=False):
            logits = self.gate(x.to(self.gate.weight.dtype))
        scores = logits.sigmoid()
        chosen = (scores > self.threshold).scatter(-1, stable_top_k(scores.detach(), 1), True)
        decision = RoutingDecision.from_mask(chosen, scores, valid=context.valid)
        return RouterOutput(decision=decision, logits=logits, probs=scores / scores.sum(-1, keepdim=True))
