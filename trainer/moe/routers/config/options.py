"""Options shared by several routers. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from trainer.config.base import Problem, Renamed
from trainer.config.numbers import Experts, ExtraExperts, Factor
from trainer.config.plugins import KindConfig

if TYPE_CHECKING:
    from trainer.moe.routing import Router

Score = Literal["softmax", "sigmoid"]


class RouterOptions(KindConfig):
    """Base class of all router configs.

    A new router is a subclass with a `build`; whatever else the trainer must know about a router it reads from the
    flags and properties below, never from a list of names.
    """

    ranks_choices: ClassVar[bool] = False
    """A token's k choices are listed from best to worst."""
    has_fixed_k: ClassVar[bool] = False
    """Every token has exactly k choices, so that a capacity can be computed before routing."""
    has_probs: ClassVar[bool] = True
    """The router has probabilities, from which a balance loss can be computed."""
    learns_weights: ClassVar[bool] = True
    """Combine weights depend on learned scores."""
    estimates_load: ClassVar[bool] = False
    """The router returns a differentiable load."""
    needs_token_ids: ClassVar[bool] = False
    """The router chooses experts by the ids of the tokens."""
    replays_experts: ClassVar[bool] = False
    """A token's experts can be given (`train.routing_replay`): the router passes its choice through
    `RoutingContext.chosen`, and weights what it gets back by its own rule."""
    required_experts: ClassVar[int | None] = None
    """The only possible number of experts; None: any number."""
    why_no_capacity: ClassVar[str] = "this router decides by itself how many tokens an expert gets"
    """Reason why a router without `has_fixed_k` takes no capacity factor, for the error message."""

    @property
    def has_static_flops(self) -> bool:
        """True if the number of experts per token is known in advance."""
        return True

    @property
    def recorded_k(self) -> int | None:
        """Number of experts of every token in a routing record; None if it differs between tokens or steps."""
        return getattr(self, "top_k", None) if self.has_fixed_k and self.has_static_flops else None

    @property
    def is_self_balancing(self) -> bool:
        """True if the router balances the load without a balance loss, which its authors omit; by default by a bias."""
        return getattr(self, "bias_update_rate", 0) > 0

    @property
    def weight_sum(self) -> float | None:
        """Sum of a token's combine weights; None if it depends on the token."""
        return None

    @property
    def num_null_experts(self) -> int:
        """Number of null experts (experts without computation)."""
        return getattr(self, "null_experts", 0)

    def is_always_even(self, num_experts: int) -> bool:
        """Return whether in training every expert gets the same number of tokens of a sequence, for any scores."""
        return num_experts + self.num_null_experts == 1

    def experts_per_token(self, num_experts: int) -> float:
        """Return the number of experts that compute a token: the mean if it is fixed, else the maximum."""
        return getattr(self, "top_k", num_experts)

    def most_experts(self, num_experts: int) -> int:
        """Return the maximum number of experts per token."""
        return min(num_experts, getattr(self, "top_k", num_experts))

    def problems_among(self, num_experts: int) -> Iterator[Problem]:
        """Check the options that depend on `num_experts`."""
        top_k = getattr(self, "top_k", 1)
        if top_k > num_experts:
            yield Problem("top_k", f"{top_k} is more than num_experts {num_experts}; use 1 to {num_experts}")

    def arguments(self) -> dict[str, Any]:
        """Return the options as keyword arguments of the router."""
        return self.model_dump(exclude={"kind", "top_k_choices", "evaluation_routing"})

    def build(self, *, d_model: int, num_experts: int, layer: int) -> Router:
        """Create the router of block `layer`, importing its module here so that configs stay free of torch."""
        raise NotImplementedError


class JitterOptions(RouterOptions):
    """Options of routers with a gate on the token's activations."""

    jitter: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Multiply the gate's input by uniform noise from [1 - jitter, 1 + jitter] in training."""


class TopKOptions(JitterOptions):
    """Options of routers that select the k best-scored experts of a token."""

    old_names = {"draw_top_k": Renamed("top_k_choices")}  # noqa: RUF012
    ranks_choices: ClassVar[bool] = True
    has_fixed_k: ClassVar[bool] = True
    replays_experts: ClassVar[bool] = True

    top_k: Experts = 2
    """Experts per token, k."""
    top_k_choices: Annotated[list[Experts], Field(min_length=1)] | None = None
    """Draw k for every training step from these values, by the seed; repeat a value to draw it more often. The model
    then performs well at each of them (`eval --experts-per-token`). Null: always `top_k`, which evaluation and
    generation always use.

    With normalized weights, steps with k = 1 train the router by its auxiliary losses only: the weight is always 1.
    """
    normalize: bool = True
    """Divide the k combine weights by their sum. False keeps the raw scores."""
    scale: Factor = 1.0
    """Factor on the combine weights, after normalization (DeepSeek's routed scaling factor)."""
    null_experts: ExtraExperts = 0
    """Experts without computation that can be among a token's k, so that easy tokens use fewer (MoE++, 2410.07348).

    Their scores take part in the normalization, but they add nothing to the output. The balance loss includes them: a
    token then has k * E / (E + null_experts) real experts on average.
    """

    @property
    def has_static_flops(self) -> bool:
        """True if k is the same in every step."""
        return self.top_k_choices is None

    @property
    def weight_sum(self) -> float | None:
        """The scale, if weights are normalized."""
        return self.scale if self.normalize else None

    def is_always_even(self, num_experts: int) -> bool:
        """Return whether every token takes all experts."""
        return min(self.top_k_choices or [self.top_k]) == num_experts + self.null_experts

    def experts_per_token(self, num_experts: int) -> float:
        """Return the mean number of real experts per token at a uniform load."""
        return self.top_k * num_experts / (num_experts + self.null_experts)

    def problems(self) -> Iterator[Problem]:
        """Refuse a router that gets no gradient from the language-model loss."""
        yield from super().problems()
        key = "top_k" if self.top_k_choices is None else "top_k_choices"
        if self.normalize and max(self.top_k_choices or [self.top_k]) == 1:
            yield Problem(
                "normalize",
                f"true with {key} 1 makes every combine weight the constant 1, so the router gets no gradient; "
                f"set normalize: false, or {key}: 2 or more",
            )

    def problems_among(self, num_experts: int) -> Iterator[Problem]:
        """Refuse a k above the number of experts."""
        choices = num_experts + self.null_experts
        nulls = f" and {self.null_experts} null experts" if self.null_experts else ""
        for key, most in self.top_k_limits():
            if most > choices:
                yield Problem(key, f"{most} is more than num_experts {num_experts}{nulls}; use 1 to {choices}")

    def most_experts(self, num_experts: int) -> int:
        """Return the maximum number of experts per token, over all steps."""
        return min(num_experts, max(most for _, most in self.top_k_limits()))

    def build(self, *, d_model: int, num_experts: int, layer: int) -> Router:
        """Create the router of block `layer`."""
        from trainer.moe.routers.top_k import TopKRouter

        return TopKRouter(d_model=d_model, num_experts=num_experts, layer=layer, **self.arguments())

    def top_k_limits(self) -> list[tuple[str, int]]:
        """Return every key that sets k, with its largest value."""
        return [("top_k", self.top_k), *([("top_k_choices", max(self.top_k_choices))] if self.top_k_choices else [])]


class EvenOptions(RouterOptions):
    """Options of routers that assign k experts with equal weights."""

    has_fixed_k: ClassVar[bool] = True
    has_probs: ClassVar[bool] = False
    learns_weights: ClassVar[bool] = False

    @property
    def weight_sum(self) -> float | None:
        """1."""
        return 1.0


class NonCausalOptions(RouterOptions):
    """Options of routers that route all tokens of a sequence jointly."""

    old_names = {"evaluation": Renamed("evaluation_routing", {"same": "as_trained"})}  # noqa: RUF012

    evaluation_routing: Literal["top_k", "as_trained"] = "top_k"
    """Routing of held-out text. `top_k`: each token takes its k best-scored experts, independently of later tokens.
    `as_trained`: jointly, as in training; the loss is then that of a model that sees what it predicts. Generation
    always uses `top_k`."""

    @property
    def is_self_balancing(self) -> bool:
        """True: every expert gets its share of a sequence."""
        return True

    def arguments(self) -> dict[str, Any]:
        """Return the options as keyword arguments of the router."""
        return {**super().arguments(), "evaluates_as_trained": self.evaluation_routing == "as_trained"}


class AssignmentOptions(NonCausalOptions):
    """Options of routers that assign a sequence's tokens to experts within a capacity."""

    old_names = {**NonCausalOptions.old_names, "room": Renamed("capacity_factor")}  # noqa: RUF012

    top_k: Experts = 2
    """Maximum experts per token, k."""
    capacity_factor: Factor = 1.0
    """Tokens of a sequence of n that an expert accepts, in units of its fair share k * n / E, rounded up."""

    def experts_per_token(self, num_experts: int) -> float:
        """Return the mean number of experts: less than k if the capacity factor is below 1."""
        return min(self.top_k, self.capacity_factor * self.top_k)
