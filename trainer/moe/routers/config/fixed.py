"""Configs of routers without learned parameters, as baselines. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from trainer.config.numbers import Experts, Whole
from trainer.moe.routers.config.options import EvenOptions

if TYPE_CHECKING:
    from trainer.moe.routing import Router


class HashRouterConfig(EvenOptions):
    """Experts by a hash of the token id, with equal weights (Roller et al. 2021, arXiv 2106.04426)."""

    needs_token_ids: ClassVar[bool] = True

    kind: Literal["hash"] = "hash"
    top_k: Experts = 1
    """Distinct experts per token, k."""
    salt: Whole = 0
    """Selects the hash function."""

    def build(self, *, d_model: int, num_experts: int, layer: int) -> Router:
        """Create the router of block `layer`."""
        from trainer.moe.routers.hash import HashRouter

        return HashRouter(num_experts=num_experts, layer=layer, **self.arguments())


class RandomRouterConfig(EvenOptions):
    """Random experts for every token, with equal weights: the baseline for learned routing."""

    kind: Literal["random"] = "random"
    top_k: Experts = 2
    """Distinct experts per token, k."""

    def build(self, *, d_model: int, num_experts: int, layer: int) -> Router:
        """Create the router of block `layer`."""
        from trainer.moe.routers.random import RandomRouter

        return RandomRouter(num_experts=num_experts, layer=layer, **self.arguments())


class RoundRobinRouterConfig(EvenOptions):
    """Experts in turn by position, with equal weights: perfectly balanced, for benchmarks."""

    kind: Literal["round_robin"] = "round_robin"
    top_k: Experts = 2
    """Experts per token, k."""

    def build(self, *, d_model: int, num_experts: int, layer: int) -> Router:
        """Create the router of block `layer`."""
        from trainer.moe.routers.round_robin import RoundRobinRouter

        return RoundRobinRouter(num_experts=num_experts, **self.arguments())
