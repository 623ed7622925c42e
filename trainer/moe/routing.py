"""The router interface: its input, its output, and the decision that layers act on.

# T tokens here, k experts per token, A assignments, E experts, D d_model, B sequences.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Protocol, Self

import torch
from torch import Tensor, nn

Causality = Literal["strict", "within_sequence", "no"]
_WEAKEST_LAST: tuple[Causality, ...] = ("strict", "within_sequence", "no")


def weakest(guarantees: Sequence[Causality]) -> Causality:
    """Return the weakest of these guarantees; `strict` if there are none."""
    return max(guarantees, key=_WEAKEST_LAST.index, default="strict")


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingOptions:
    """Routing options of one forward pass, which are not in the config."""

    noise_seed: int | None = None
    """Seed of all noise; None: no noise (evaluation)."""
    dropless: bool = False
    """Ignore the capacity (evaluation, generation)."""
    top_k: int | None = None
    """Experts per token, overriding the config."""
    counts_targets_only: bool = False
    """Collect statistics only of tokens whose target counts in the loss (evaluation), not of the context."""
    return_router_outputs: bool = False
    """Return each router's output with the statistics."""
    return_experts: bool = False
    """Return each token's experts with the statistics, from routers with a fixed k."""


class RowParts(Protocol):
    """Rows of which only a part is here."""

    def whole(self, x: Tensor) -> Tensor:
        """Return (B, S of the row, ...) in the order of the row from those here (B, S, ...); without gradient."""
        ...

    def own(self, whole: Tensor) -> Tensor:
        """Return what is here of whole rows."""
        ...

    def attended(self, positions: Tensor) -> Tensor:
        """Return the positions of all tokens that attention sees here, given those (S,) that are here."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingContext:
    """Input of a router besides the activations; tensors are (T,). Options are those of `RoutingOptions`.

    A row may be longer than what is here of it: what decides about rows must see `whole_rows`.
    """

    token_ids: Tensor
    """int64."""
    valid: Tensor
    """bool; False for padding, which is neither dispatched nor counted."""
    position: Tensor
    """int64 column in the row."""
    sequence_index: Tensor
    """int64 row of the batch, in [0, num_sequences)."""
    num_sequences: int
    """B; all rows have T / B tokens."""
    num_valid: int | None = None
    """Number of valid tokens, if the host knows it: then the rows of a fixed k are known without asking the device."""
    noise_key: Tensor | None = None
    """int64 key of each token's noise, a function of seed, sample and position; None: no noise."""
    top_k: int | None = None
    dropless: bool = False
    counted: Tensor | None = None
    """bool; the valid tokens that are in the statistics. None: all of them."""
    return_router_outputs: bool = False
    return_experts: bool = False
    replayed: Tensor | None = None
    """(T, L, k) expert ids to use in place of the routers' own choices, in the L MoE layers. None: nothing is given."""
    given: Tensor | None = None
    """(T, k) int64: those of the layer that this context is for."""
    is_incremental: bool = False
    """The rows are appended to a KV cache, so the rest of each sequence does not exist yet."""
    row_parts: RowParts | None = None
    """Shows whole rows; None: they are here."""

    @property
    def is_training(self) -> bool:
        """True if there is noise: only training has it."""
        return self.noise_key is not None

    @property
    def valid_rows(self) -> Tensor:
        """(B, S) bool."""
        return self.valid.view(self.num_sequences, -1)

    def whole_rows(self, x: Tensor) -> Tensor:
        """Return (B, S of the row, ...) from x (T, ...), without gradient if the rows are not all here."""
        rows = x.view(self.num_sequences, -1, *x.shape[1:])
        return rows if self.row_parts is None else self.row_parts.whole(rows)

    def own_tokens(self, rows: Tensor) -> Tensor:
        """Return (T, ...) from whole rows (B, S of the row, ...)."""
        return (rows if self.row_parts is None else self.row_parts.own(rows)).flatten(0, 1)

    def of_layer(self, index: int) -> Self:
        """Return the context of a MoE layer, counted from 0 among them: with the experts that are given for it."""
        return self if self.replayed is None else replace(self, given=self.replayed[:, index].long())

    def chosen(self, live: Tensor) -> Tensor:
        """Return the experts (T, k) to use: those given, else the router's own choice `live` (T, k).

        The one place where a choice is replaced: whatever follows from it, the router computes as for its own.
        """
        if self.given is None:
            return live
        assert self.given.shape == live.shape, f"experts {tuple(self.given.shape)} for a choice {tuple(live.shape)}"
        return self.given


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingDecision:
    """A sparse (T, E) matrix of combine weights in coordinate form: the assignments of tokens to experts.

    Assignments are ordered by token, then slot; sums over a token's experts are accumulated in this order.
    """

    token_index: Tensor
    """(A,) int64 in [0, num_tokens)."""
    expert_index: Tensor
    """(A,) int64 global expert index; an index >= num_experts is a null expert, which computes nothing."""
    combine_weight: Tensor
    """(A,) at least float32, differentiable."""
    kept: Tensor
    """(A,) bool; False if dropped, or if the token is padding."""
    num_tokens: int
    num_experts: int
    top_k: int | None = None
    """k, if every token has exactly k assignments: A = T * k, and assignment a belongs to token a // k."""
    capacity: int | None = None
    """Static maximum of rows per expert from this rank. None: dropless."""
    num_rows: int | None = None
    """Number of assignments that are kept and not to null experts, if the host knows it without waiting.

    With a fixed k it is k times the valid tokens. None: it depends on the decision, and whoever needs it waits for the
    device. Whoever keeps fewer, as a capacity does, must set it to None.
    """
    most_per_token: int | None = None
    """The most assignments that a token has, kept or not, if the host knows it without waiting."""

    def renumbered(self, new_number: Tensor) -> "RoutingDecision":
        """Return the decision in new numbers of the experts (E,); null experts keep theirs."""
        expert, last = self.expert_index, len(new_number) - 1
        new = torch.where(expert <= last, new_number[expert.clamp(max=last)], expert)
        return replace(self, expert_index=new)

    @classmethod
    def from_top_k(
        cls,
        expert_index: Tensor,
        combine_weight: Tensor,
        *,
        num_experts: int,
        valid: Tensor,
        num_valid: int | None = None,
    ) -> Self:
        """Create a decision in which every token has k experts; indices and weights are (T, k), `valid` is (T,).

        `num_valid` is `context.num_valid`, or None if any of the experts may be a null expert.
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
            num_rows=None if num_valid is None else top_k * num_valid,
            most_per_token=top_k,
        )

    @classmethod
    def from_mask(cls, chosen: Tensor, weight: Tensor, *, valid: Tensor) -> Self:
        """Create a decision in which the number of experts varies by token; a token's are in expert order.

        chosen (T, E) is ignored for padding, where valid (T,) is False; weight (T, E) has the weights of its entries.
        Waits for the device once: the number of assignments and the most of a token size all that follows.
        """
        num_tokens, num_experts = chosen.shape
        chosen = chosen & valid[:, None]
        per_token = torch.cat([chosen.sum(1), valid.new_zeros(1, dtype=torch.int64)])  # one more, if there are none
        num_rows, most_per_token = torch.stack([per_token.sum(), per_token.amax()]).tolist()  # waits for the device
        token_index, expert_index = chosen.nonzero_static(size=num_rows).unbind(1)
        return cls(
            token_index=token_index,
            expert_index=expert_index,
            combine_weight=weight[token_index, expert_index],
            kept=torch.ones_like(token_index, dtype=torch.bool),
            num_tokens=num_tokens,
            num_experts=num_experts,
            num_rows=num_rows,
            most_per_token=most_per_token,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterOutput:
    """Output of a router."""

    decision: RoutingDecision
    logits: Tensor | None
    """(T, E) at least float32, without selection bias. None: the router has none, and no z-loss."""
    probs: Tensor | None
    """(T, E) at least float32; each row sums to 1. None: the router has none, and no balance loss.

    With null experts (T, E + 1): the last column is their sum.
    """
    load: Tensor | None = None
    """(T, E) differentiable probability that a token selects an expert, from routers whose noise defines one."""
    scores: Tensor | None = None
    """(T, E + n) non-negative affinity of token and expert (or null expert) before any selection bias, without
    gradient; the optimality of routing is measured by it. None: `probs` is used."""
    log_norm: Tensor | None = None
    """(T,) logsumexp of the logits, if the router has it; None: it is computed where the z-loss needs it."""
    loss: Tensor | None = None
    """(T,) the router's own loss, including its coefficient; None: it has none."""
    live_choice: Tensor | None = None
    """(T, k) what the router chose before `RoutingContext.chosen`; None: its experts cannot be given."""


class Router(nn.Module, ABC):
    """Assigns experts to tokens. Independent of ranks, capacity and the auxiliary losses."""

    causal: ClassVar[Causality] = "strict"
    """Dependence of a token's experts on other tokens in training. The capacity policy can weaken it.

    `strict`: on no later token. `within_sequence`: on later tokens of the same row only. `no`: on any token.
    """
    sees_whole_rows: ClassVar[bool] = False
    """Decides what depends on other tokens from `RoutingContext.whole_rows`, so that a rank may have a part of each row
    only (`parallel.cp_size`). A `strict` router that looks at each token by itself needs nothing."""
    initial_values: ClassVar[Mapping[str, float]] = {}
    """Initial values, by name, of parameters that are not matrices, such as a scale or a temperature; the default is 0.
    Matrices are initialized randomly, and only they have weight decay."""

    @property
    def causal_in_evaluation(self) -> Causality:
        """Causality in evaluation."""
        return self.causal

    @abstractmethod
    def forward(self, x: Tensor, context: RoutingContext) -> RouterOutput:
        """Route tokens x (T, D)."""

    def update(self, tokens_per_expert: Tensor) -> None:
        """Update the router's state from a step's counts (E,) before drops; (E + 1,) with the sum of null experts.

        Called once after each optimizer step; does nothing unless overridden.
        """
