"""Threshold router: every expert whose score exceeds a threshold, and the best one in any case."""

import torch
from torch import Tensor, nn

from trainer.moe.routers.config.options import RouterOptions
from trainer.moe.routing import Router, RouterOutput, RoutingContext, RoutingDecision
from trainer.ops.select import stable_top_k


class ThresholdRouterConfig(RouterOptions):
    """Options of `model.moe.router`."""

    threshold: float = 0.6

    def build(self, *, d_model: int, num_experts: int, layer: int) -> Router:
        return ThresholdRouter(self.threshold, d_model=d_model, num_experts=num_experts)


class ThresholdRouter(Router):
    def __init__(self, threshold: float, *, d_model: int, num_experts: int) -> None:
        super().__init__()
        self.threshold = threshold
        self.gate = nn.Linear(d_model, num_experts, bias=False)

    def forward(self, x: Tensor, context: RoutingContext) -> RouterOutput:
        with torch.autocast(x.device.type, enabled=False):  # routers compute in float32
            scores = self.gate(x.to(self.gate.weight.dtype)).sigmoid()  # (T, E)
        chosen = (scores > self.threshold).scatter(-1, stable_top_k(scores.detach(), 1), True)
        decision = RoutingDecision.from_mask(chosen, scores, valid=context.valid)
        return RouterOutput(decision=decision, logits=None, probs=scores / scores.sum(-1, keepdim=True))
