"""Input and output of a router, and the contract between them.

# T tokens here, k experts per token, A assignments, E experts, D d_model, B sequences.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor, nn

Causality = Literal["strict", "within_sequence", "no"]
_WEAKEST_LAST: tuple[Causality, ...] = ("strict", "within_sequence", "no")


def weaker(one: Causality, other: Causality) -> Causality:
    """Return which of two promises says less."""
    return max(one, other, key=_WEAKEST_LAST.index)


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingOptions:
    """Routing options of one forward pass, beside the config."""

    noise_seed: int | None = None
    """Seed of all noise; None switches noise off (evaluation)."""
    dropless: bool = False
    """Ignore the capacity (evaluation, generation)."""
    top_k: int | None = None
    """Experts per token instead of the configured number, of routers that have one."""
    counts_targets_only: bool = False
    """Statistics are of the tokens whose target counts in the loss, not of those that are only read (evaluation)."""
    return_router_outputs: bool = False
    """Return each router's output with the statistics."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingContext:
    """Input of a router besides the activations; tensors are (T,)."""

    token_ids: Tensor
    """int64."""
    valid: Tensor
    """bool; padding is never dispatched and never counted."""
    position: Tensor
    """int64 column in the row."""
    sequence_index: Tensor
    """int64 row of this batch, in [0, num_sequences)."""
    num_sequences: int
    """B; rows are equally long, so a row has T / B tokens."""
    noise_key: Tensor | None = None
    """int64 key of this token's noise, a function of seed, sample and position; None: no noise."""
    top_k: int | None = None
    """Experts per token instead of the configured number, of routers that have one."""
    dropless: bool = False
    """Ignore the capacity."""
    counted: Tensor | None = None
    """bool, of valid tokens: which of them are in the statistics. None: all."""
    return_router_outputs: bool = False
    """Hand on what the router puts out."""
    is_incremental: bool = False
    """The rows are pieces that are appended to a cache: what comes later in them is not there yet."""

    @property
    def is_training(self) -> bool:
        """Training has noise, evaluation and generation have none."""
        return self.noise_key is not None

    @property
    def valid_rows(self) -> Tensor:
        """(B, S) bool."""
        return self.valid.view(self.num_sequences, -1)


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingDecision:
    """A sparse (T, E) matrix in coordinate form: which token goes to which expert, and how much it counts.

    Assignments are listed token-major, then slot; sums over a token's experts run in this order.
    """

    token_index: Tensor
    """(A,) int64 in [0, num_tokens)."""
    expert_index: Tensor
    """(A,) int64, global expert ids; an index >= num_experts is a null expert, which computes nothing."""
    combine_weight: Tensor
    """(A,) at least float32, differentiable."""
    kept: Tensor
    """(A,) bool; False: dropped, or the token is not valid."""
    num_tokens: int
    num_experts: int
    top_k: int | None = None
    """k, if every token has exactly k assignments; then A = T * k and assignment a belongs to token a // k."""
    capacity: int | None = None
    """Rows an expert may get from this rank; static. None: dropless."""

    @classmethod
    def from_top_k(cls, expert_index: Tensor, combine_weight: Tensor, *, num_experts: int, valid: Tensor) -> Self:
        """Make the decision of a router that gives every token k experts.

        Args:
            expert_index: (T, k) int64.
            combine_weight: (T, k).
            num_experts: E.
            valid: (T,) bool.
        """
        num_tokens, top_k = expert_index.shape
        token_index = torch.arange(num_tokens, device=expert_index.device).repeat_interleave(top_k)  # (A,)
        return cls(
            token_index=token_index,
            expert_index=expert_index.reshape(-1),
            combine_weight=combine_weight.reshape(-1),
            kept=valid.repeat_interleave(top_k),
            num_tokens=num_tokens,
            num_experts=num_experts,
            top_k=top_k,
        )

    @classmethod
    def from_mask(cls, chosen: Tensor, weight: Tensor, *, valid: Tensor) -> Self:
        """Make the decision of a router that gives tokens different numbers of experts, listed in expert order.

        Args:
            chosen: (T, E) bool; of tokens that are not valid it does not matter.
            weight: (T, E), of which the chosen entries are the combine weights.
            valid: (T,) bool.
        """
        num_tokens, num_experts = chosen.shape
        token_index, expert_index = (chosen & valid[:, None]).nonzero(as_tuple=True)  # waits for the device
        return cls(
            token_index=token_index,
            expert_index=expert_index,
            combine_weight=weight[token_index, expert_index],
            kept=torch.ones_like(token_index, dtype=torch.bool),
            num_tokens=num_tokens,
            num_experts=num_experts,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterOutput:
    """Output of a router."""

    decision: RoutingDecision
    logits: Tensor | None
    """(T, E) at least float32, raw: no selection bias. None: the router has none, and its z-loss is 0."""
    probs: Tensor | None
    """(T, E) at least float32, each row sums to 1. None: the router has none, and its balance loss is 0.

    With null experts (T, E + 1): the last column is all of them together.
    """
    load: Tensor | None = None
    """(T, E) smooth estimate of how often a token goes to an expert, of routers whose noise gives one."""
    scores: Tensor | None = None
    """(T, E + n) without gradient, not negative: what a pair of token and expert (or null expert) is worth in the
    router's own eyes, before any selection bias; choices are measured by it. None: what `probs` says."""
    loss: Tensor | None = None
    """(T,) the router's own loss, its coefficient included; None: it has none."""


class Router(nn.Module, ABC):
    """Scores tokens. Knows no rank, no capacity and no loss of others."""

    causal: ClassVar[Causality] = "strict"
    """Dependence of a token's experts on other tokens while training. The capacity policy can weaken it.

    `strict`: on no later token. `within_sequence`: on later tokens, but of its own row only. `no`: on any.
    """
    initial_values: ClassVar[Mapping[str, float]] = {}
    """Initial values, by name, of parameters that are no matrices, such as a scale or a temperature. Others start from
    0, as biases do; matrices are drawn. Weight decay is for matrices alone."""

    @property
    def causal_in_evaluation(self) -> Causality:
        """Causality without noise, in evaluation and generation."""
        return self.causal

    @abstractmethod
    def forward(self, x: Tensor, context: RoutingContext) -> RouterOutput:
        """Route tokens x (T, D)."""

    def update(self, tokens_per_expert: Tensor) -> None:
        """Learn from the (E,) counts of a whole optimizer step, before drops; (E + 1,) with null experts, all together.

        Called once after each step; does nothing unless overridden.
        """
