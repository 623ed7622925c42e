"""Top-k by direction: how well a projected token points where the expert does."""

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.moe.routers.config.token_choice import CosineRouterConfig
from trainer.moe.routers.top_k import TopKRouter

_MOST = 100.0  # a temperature below 1 / 100 makes one-hot scores of float32


class CosineRouter(TopKRouter):
    """Logits are cosines of the projected token with each expert's direction, times a learned factor.

        logit_e = cos(W x, v_e) * min(100, 10 * exp(s))        s: learned, 0 at first

    Only directions count, which keeps token representations from collapsing onto the experts' rows.

    Source: X-MoE (Chi et al. 2022, arXiv 2204.09179), with its inverse temperature 10 exp(s) instead of 1 / tau,
    so that it stays positive.
    """

    initial_values: ClassVar[Mapping[str, float]] = {"log_scale": 0.0}

    def __init__(self, config: CosineRouterConfig, *, d_model: int, num_experts: int, layer: int) -> None:
        self.d_proj = config.d_proj
        super().__init__(config, "softmax", d_model=d_model, num_experts=num_experts, layer=layer)

    def make_gate(self, d_model: int, num_columns: int) -> None:
        """Make the projection, the experts' directions and the learned factor."""
        self.projection = nn.Linear(d_model, self.d_proj, bias=False)
        self.directions = nn.Parameter(torch.randn(num_columns, self.d_proj))  # (E + n, P)
        self.log_scale = nn.Parameter(torch.zeros(1))

    def logits(self, x: Tensor) -> Tensor:
        """Return logits (T, E + n) of tokens x (T, D), in at least float32."""
        with torch.autocast(x.device.type, enabled=False):
            projected = self.projection(x.to(self.projection.weight.dtype))  # (T, P)
            cosine = F.linear(F.normalize(projected, dim=-1), F.normalize(self.directions, dim=-1))
            return cosine * (10 * self.log_scale.exp()).clamp(max=_MOST)
