"""Dense routing: every token visits every expert, as in the second founding document."""

import torch
from torch import Tensor, nn

from trainer.moe.routers.top_k import gate_logits
from trainer.moe.routing import Router, RouterOutput, RoutingContext, RoutingDecision


class DenseRouter(Router):
    """Computes y = sum_i g_i(x) e_i(x) over all experts, g = softmax of the logits. A baseline without sparsity."""

    def __init__(self, *, d_model: int, num_experts: int) -> None:
        super().__init__()
        self.gate = nn.Linear(d_model, num_experts, bias=False)

    def forward(self, x: Tensor, context: RoutingContext) -> RouterOutput:
        """Send tokens x (T, D) to all experts, in expert order."""
        logits = gate_logits(self.gate, x)  # (T, E)
        probs = logits.softmax(-1)
        every_expert = torch.arange(logits.shape[-1], device=x.device).expand(logits.shape)
        decision = RoutingDecision.from_top_k(
            every_expert, probs, num_experts=logits.shape[-1], valid=context.valid, num_valid=context.num_valid
        )
        return RouterOutput(decision=decision, logits=logits, probs=probs)
