"""Configs of the routers that decide a sequence's tokens together, and so look ahead. Imports no torch."""

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
    """Every expert takes the tokens of a sequence that score best for it (Zhou et al. 2022, arXiv 2202.09368)."""

    kind: Literal["expert_choice"] = "expert_choice"

    def is_always_even(self, num_experts: int) -> bool:
        """Return true: every expert takes as many as it has room for."""
        return True

    def experts_per_token(self, num_experts: int) -> float:
        """Return the mean number, which grows with the room."""
        return min(num_experts, self.capacity_factor * self.top_k)

    def most_experts(self, num_experts: int) -> int:
        """Return all: any number of experts can choose a token."""
        return num_experts

    def build(self, *, d_model: int, num_experts: int, layer: int) -> Router:
        """Make the router of MoE layer `layer`."""
        from trainer.moe.routers.expert_choice import ExpertChoiceRouter

        return ExpertChoiceRouter(**self.assignment_arguments(), d_model=d_model, num_experts=num_experts)


class LinearProgramRouterConfig(AssignmentOptions):
    """The best assignment there is: the 0-1 programme of the first founding document, solved exactly."""

    kind: Literal["linear_program"] = "linear_program"

    def packages(self) -> Iterator[tuple[str, str]]:
        """Yield the solver."""
        yield "kind", "scipy"

    def build(self, *, d_model: int, num_experts: int, layer: int) -> Router:
        """Make the router of MoE layer `layer`."""
        from trainer.moe.routers.linear_program import LinearProgramRouter

        return LinearProgramRouter(**self.assignment_arguments(), d_model=d_model, num_experts=num_experts)


class GreedyRouterConfig(AssignmentOptions):
    """Greedy heuristic for the linear programme: the best pair of token and expert first, while there is room."""

    kind: Literal["greedy"] = "greedy"

    def build(self, *, d_model: int, num_experts: int, layer: int) -> Router:
        """Make the router of MoE layer `layer`."""
        from trainer.moe.routers.greedy import GreedyRouter

        return GreedyRouter(**self.assignment_arguments(), d_model=d_model, num_experts=num_experts)


class BASELayerRouterConfig(NonCausalOptions):
    """One expert per token, all equally loaded, at the best sum of logits (BASE, Lewis et al. 2021, 2103.16716)."""

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

    def build(self, *, d_model: int, num_experts: int, layer: int) -> Router:
        """Make the router of MoE layer `layer`."""
        from trainer.moe.routers.base_layer import BASELayerRouter

        return BASELayerRouter(d_model=d_model, num_experts=num_experts, evaluates_as_trained=self.evaluates_as_trained)


class SinkhornRouterConfig(NonCausalOptions):
    """Top-k of a balanced transport plan of the logits (S-BASE, Clark et al. 2022, arXiv 2202.01169)."""

    has_fixed_k: ClassVar[bool] = True
    kind: Literal["sinkhorn"] = "sinkhorn"
    top_k: Experts = 1
    """Experts per token, k."""
    score: Score = "sigmoid"
    """Function from a logit to its expert's combine weight."""
    iterations: Annotated[int, Field(gt=0, le=10**4)] = 30
    """Number of scalings of the plan's rows and columns."""

    def build(self, *, d_model: int, num_experts: int, layer: int) -> Router:
        """Make the router of MoE layer `layer`."""
        from trainer.moe.routers.sinkhorn import SinkhornRouter

        return SinkhornRouter(
            d_model=d_model,
            num_experts=num_experts,
            top_k=self.top_k,
            score=self.score,
            iterations=self.iterations,
            evaluates_as_trained=self.evaluates_as_trained,
        )


class MixtureOfDepthsRouterConfig(NonCausalOptions):
    """Some tokens of a sequence pass the feed-forward network, the others go around it (arXiv 2404.02258).

    With `num_experts: 1` the layer's one expert is that network.
    """

    old_names = {**NonCausalOptions.old_names, "share": Renamed("capacity")}  # noqa: RUF012
    has_probs: ClassVar[bool] = False
    required_experts: ClassVar[int | None] = 1
    kind: Literal["mixture_of_depths"] = "mixture_of_depths"
    capacity: Annotated[float, Field(gt=0, le=1)] = 0.125
    """Share of a sequence's tokens that are computed, rounded up."""
    predictor_coef: Coefficient = 0.01
    """Weight of the loss that teaches a token's logit its own sign: positive if it is among the computed.

    In evaluation the sign alone decides, which looks at no later token.
    """

    def problems(self) -> Iterator[Problem]:
        """Refuse an evaluation by what nothing has taught."""
        if self.predictor_coef == 0 and self.evaluation_routing == "top_k":
            yield Problem(
                "predictor_coef",
                "0 leaves the sign, by which evaluation chooses, to chance; use more than 0, or "
                "evaluation_routing: as_trained",
            )

    def experts_per_token(self, num_experts: int) -> float:
        """Return the share of tokens that are computed."""
        return self.capacity

    def problems_among(self, num_experts: int) -> Iterator[Problem]:
        """Refuse more than one network."""
        if num_experts != 1:
            yield Problem(
                "kind", f"mixture_of_depths has one network to go around; use num_experts: 1, not {num_experts}"
            )

    def build(self, *, d_model: int, num_experts: int, layer: int) -> Router:
        """Make the router of MoE layer `layer`."""
        from trainer.moe.routers.mixture_of_depths import MixtureOfDepthsRouter

        return MixtureOfDepthsRouter(
            d_model=d_model,
            capacity=self.capacity,
            predictor_coef=self.predictor_coef,
            evaluates_as_trained=self.evaluates_as_trained,
        )
