"""Configs of routers that route the tokens of a sequence jointly, and so are not causal. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from trainer.config.base import Problem, Renamed
from trainer.config.numbers import Coefficient, Experts
from trainer.moe.routers.config.options import AssignmentOptions, NonCausalOptions, Score

if TYPE_CHECKING:
    from trainer.moe.routing import Router


class ExpertChoiceRouterConfig(AssignmentOptions):
    """Every expert takes the best-scored tokens of a sequence (Zhou et al. 2022, arXiv 2202.09368)."""

    kind: Literal["expert_choice"] = "expert_choice"

    def is_always_even(self, num_experts: int) -> bool:
        """Return True: every expert is filled to capacity."""
        return True

    def experts_per_token(self, num_experts: int) -> float:
        """Return the mean number, which is proportional to the capacity factor."""
        return min(num_experts, self.capacity_factor * self.top_k)

    def most_experts(self, num_experts: int) -> int:
        """Return all: any number of experts can choose a token."""
        return num_experts

    def build(self, *, d_model: int, num_experts: int, layer: int) -> Router:
        """Create the router of block `layer`."""
        from trainer.moe.routers.expert_choice import ExpertChoiceRouter

        return ExpertChoiceRouter(d_model=d_model, num_experts=num_experts, **self.arguments())


class LinearProgramRouterConfig(AssignmentOptions):
    """Optimal assignment: the 0-1 programme of the first founding document, solved exactly."""

    kind: Literal["linear_program"] = "linear_program"

    def packages(self) -> Iterator[tuple[str, str]]:
        """Yield the solver."""
        yield "kind", "scipy"

    def build(self, *, d_model: int, num_experts: int, layer: int) -> Router:
        """Create the router of block `layer`."""
        from trainer.moe.routers.linear_program import LinearProgramRouter

        return LinearProgramRouter(d_model=d_model, num_experts=num_experts, **self.arguments())


class GreedyRouterConfig(AssignmentOptions):
    """Greedy heuristic for the linear programme: (token, expert) pairs by descending score, within capacity."""

    kind: Literal["greedy"] = "greedy"

    def build(self, *, d_model: int, num_experts: int, layer: int) -> Router:
        """Create the router of block `layer`."""
        from trainer.moe.routers.greedy import GreedyRouter

        return GreedyRouter(d_model=d_model, num_experts=num_experts, **self.arguments())


class BASELayerRouterConfig(NonCausalOptions):
    """One expert per token, all equally loaded, at the maximum sum of logits (BASE layers, arXiv 2103.16716)."""

    replays_experts: ClassVar[bool] = True
    kind: Literal["base"] = "base"

    def packages(self) -> Iterator[tuple[str, str]]:
        """Yield the solver."""
        yield "kind", "scipy"

    def experts_per_token(self, num_experts: int) -> float:
        """Return 1."""
        return 1

    def most_experts(self, num_experts: int) -> int:
        """Return 1."""
        return 1

    @property
    def recorded_k(self) -> int | None:
        """1."""
        return 1

    def build(self, *, d_model: int, num_experts: int, layer: int) -> Router:
        """Create the router of block `layer`."""
        from trainer.moe.routers.base_layer import BASELayerRouter

        return BASELayerRouter(d_model=d_model, num_experts=num_experts, **self.arguments())


class SinkhornRouterConfig(NonCausalOptions):
    """Top-k of a balanced transport plan of the logits (S-BASE, Clark et al. 2022, arXiv 2202.01169)."""

    has_fixed_k: ClassVar[bool] = True
    replays_experts: ClassVar[bool] = True
    kind: Literal["sinkhorn"] = "sinkhorn"
    top_k: Experts = 1
    """Experts per token, k."""
    score: Score = "sigmoid"
    """Function from logits to combine weights."""
    iterations: Annotated[int, Field(gt=0, le=10**4)] = 30
    """Number of Sinkhorn iterations."""

    def build(self, *, d_model: int, num_experts: int, layer: int) -> Router:
        """Create the router of block `layer`."""
        from trainer.moe.routers.sinkhorn import SinkhornRouter

        return SinkhornRouter(d_model=d_model, num_experts=num_experts, **self.arguments())


class MixtureOfDepthsRouterConfig(NonCausalOptions):
    """Some tokens of a sequence pass through the feed-forward network, the others skip it (arXiv 2404.02258).

    That network is the layer's only expert: `num_experts: 1`.
    """

    old_names = {**NonCausalOptions.old_names, "share": Renamed("capacity")}  # noqa: RUF012
    has_probs: ClassVar[bool] = False
    required_experts: ClassVar[int | None] = 1
    kind: Literal["mixture_of_depths"] = "mixture_of_depths"
    capacity: Annotated[float, Field(gt=0, le=1)] = 0.125
    """Share of a sequence's tokens that are computed, rounded up."""
    predictor_coef: Coefficient = 0.01
    """Weight of the loss that trains the sign of a token's logit to predict whether the token is computed.

    In evaluation the sign alone decides, which is causal.
    """

    def problems(self) -> Iterator[Problem]:
        """Refuse an evaluation by untrained signs."""
        if self.predictor_coef == 0 and self.evaluation_routing == "top_k":
            yield Problem(
                "predictor_coef",
                "0 leaves the sign, by which evaluation routes, untrained; use more than 0, or "
                "evaluation_routing: as_trained",
            )

    def experts_per_token(self, num_experts: int) -> float:
        """Return the fraction of tokens that are computed."""
        return self.capacity

    def problems_among(self, num_experts: int) -> Iterator[Problem]:
        """Refuse more than one expert."""
        if num_experts != 1:
            yield Problem("kind", f"mixture_of_depths has a single expert; use num_experts: 1, not {num_experts}")

    def build(self, *, d_model: int, num_experts: int, layer: int) -> Router:
        """Create the router of block `layer`."""
        from trainer.moe.routers.mixture_of_depths import MixtureOfDepthsRouter

        return MixtureOfDepthsRouter(d_model=d_model, **self.arguments())
