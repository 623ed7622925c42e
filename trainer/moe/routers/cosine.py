"""Top-k by the cosine between a projected token and each expert's direction."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.moe.routers.top_k import TopKRouter

_MAX_SCALE = 100.0  # a temperature below 1 / 100 makes float32 scores one-hot


class CosineRouter(TopKRouter):
    """Computes logits as cosines with the experts' directions, times a learned scale.

        logit_e = cos(W x, v_e) * min(100, 10 * exp(s))        s: learned, initially 0

    Since only directions count, token representations are not pulled towards the expert embeddings.

    Source: X-MoE (Chi et al. 2022, arXiv 2204.09179), with the inverse temperature 10 exp(s) instead of 1 / tau, so
        that it stays positive.
    """

    initial_values: ClassVar[Mapping[str, float]] = {"log_scale": 0.0}

    def __init__(self, *, d_proj: int, **top_k_arguments: Any) -> None:
        self.d_proj = d_proj
        super().__init__(**top_k_arguments)

    def make_gate(self, d_model: int, num_columns: int) -> None:
        """Create the projection, the experts' directions and the learned scale."""
        self.projection = nn.Linear(d_model, self.d_proj, bias=False)
        self.directions = nn.Parameter(torch.randn(num_columns, self.d_proj))  # (E + n, P)
        self.log_scale = nn.Parameter(torch.zeros(1))

    def logits(self, x: Tensor) -> Tensor:
        """Return logits (T, E + n) of tokens x (T, D), in at least float32."""
        with torch.autocast(x.device.type, enabled=False):
            projected = self.projection(x.to(self.projection.weight.dtype))  # (T, P)
            cosine = F.linear(F.normalize(projected, dim=-1), F.normalize(self.directions, dim=-1))
            return cosine * (10 * self.log_scale.exp()).clamp(max=_MAX_SCALE)
