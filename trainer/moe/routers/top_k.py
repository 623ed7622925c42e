"""Token-choice routing: every token picks its k best-scored experts.

# T tokens, k experts per token, E experts, n null experts, D d_model.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from trainer.moe.routing import Router, RouterOutput, RoutingContext, RoutingDecision
from trainer.ops.noise import uniform
from trainer.ops.select import stable_top_k
from trainer.ops.softmax import softmax_and_log_norm

Score = Literal["softmax", "sigmoid"]


class TopKRouter(Router):
    """Scores experts by softmax or sigmoid, selects the top k and weights them by their (normalized) scores.

    Sigmoid scores below a logit of about -88 are 0 in float32; if all k are 0, so are the normalized weights.
    DeepSeek-V3 adds 1e-20 to the sum that it divides by, so there they fade from logits of about -46 on. Softmax with
    normalized weights is the softmax over the k selected logits, as GPT-OSS has it.

    Source: Shazeer et al. 2017 (arXiv 1701.06538); sigmoid scores as in DeepSeek-V3 (arXiv 2412.19437); null experts
        are the zero experts of MoE++ (arXiv 2410.07348).
    """

    def __init__(
        self,
        *,
        d_model: int,
        num_experts: int,
        layer: int = 0,
        top_k: int = 2,
        score: Score = "softmax",
        normalize: bool = True,
        scale: float = 1.0,
        jitter: float = 0.0,
        null_experts: int = 0,
        gate_bias: bool = False,
    ) -> None:
        """Create the gate; options as in `TopKOptions`, and `layer` separates the noise of different layers."""
        super().__init__()
        self.layer, self.num_experts, self.null_experts = layer, num_experts, null_experts
        self.top_k, self.score, self.normalize, self.scale, self.jitter = top_k, score, normalize, scale, jitter
        self.gate_bias = gate_bias
        self.make_gate(d_model, num_experts + null_experts)

    def make_gate(self, d_model: int, num_columns: int) -> None:
        """Create the parameters that `logits` uses."""
        self.gate = nn.Linear(d_model, num_columns, bias=self.gate_bias)

    def forward(self, x: Tensor, context: RoutingContext) -> RouterOutput:
        """Route tokens x (T, D)."""
        logits = self.logits(apply_jitter(x, context, self.jitter, salt=self.layer))  # (T, E + n)
        if self.score == "softmax":
            probs, log_norm = softmax_and_log_norm(logits)
            scores = probs
        else:
            (scores, probs), log_norm = score_logits(logits, self.score), None
        live = stable_top_k(self.selection_scores(scores.detach()), context.top_k or self.top_k)
        return RouterOutput(
            decision=self.decide(scores, context.chosen(live), context),
            logits=logits,
            probs=self.merge_null_columns(probs),
            scores=scores.detach(),
            log_norm=log_norm,
            live_choice=live,
        )

    def logits(self, x: Tensor) -> Tensor:
        """Return logits (T, E + n) of tokens x (T, D), in at least float32."""
        return gate_logits(self.gate, x)

    def selection_scores(self, scores: Tensor) -> Tensor:
        """Return the values (T, E + n) that experts are selected by; subclasses bias or mask the scores."""
        return scores

    def decide(self, scores: Tensor, expert_index: Tensor, context: RoutingContext) -> RoutingDecision:
        """Weight the selected experts (T, k) by their scores (T, E + n)."""
        weight = scores.gather(-1, expert_index)  # (T, k)
        if self.normalize:
            weight = normalized(weight)
        return RoutingDecision.from_top_k(
            expert_index,
            weight * self.scale,
            num_experts=self.num_experts,
            valid=context.valid,
            num_valid=None if self.null_experts else context.num_valid,
        )

    def merge_null_columns(self, probs: Tensor) -> Tensor:
        """Return probs with the n null columns summed into one: (T, E + 1); (T, E) without null experts."""
        if self.null_experts == 0:
            return probs
        real, null = probs.split([self.num_experts, self.null_experts], dim=-1)
        return torch.cat([real, null.sum(-1, keepdim=True)], dim=-1)


def gate_logits(gate: nn.Linear, x: Tensor) -> Tensor:
    """Return logits (T, E) of tokens x (T, D) in the gate's dtype, float32 or float64: autocast is disabled."""
    with torch.autocast(x.device.type, enabled=False):
        return gate(x.to(gate.weight.dtype))


def score_logits(logits: Tensor, score: Score) -> tuple[Tensor, Tensor]:
    """Return scores (T, E), and the scores normalized to sum to 1 over experts."""
    if score == "softmax":
        probs = logits.softmax(-1)
        return probs, probs
    scores = logits.sigmoid()
    return scores, normalized(scores)


def normalized(scores: Tensor) -> Tensor:
    """Return scores (T, n) divided by their sum; all 0 where the sum is 0."""
    return scores / scores.sum(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)


def apply_jitter(x: Tensor, context: RoutingContext, jitter: float, *, salt: int) -> Tensor:
    """Multiply x by uniform noise from [1 - jitter, 1 + jitter] in training (Switch Transformer, arXiv 2101.03961)."""
    if jitter == 0 or context.noise_key is None:
        return x
    noise = uniform(context.noise_key, x.shape[-1], salt=salt).to(torch.promote_types(x.dtype, torch.float32))  # (T, D)
    return x * (1 + jitter * (2 * noise - 1)).to(x.dtype)
