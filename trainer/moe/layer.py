"""The MoE layer: route, limit to capacity, dispatch, apply the experts, combine."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trainer.errors import ConfigError
from trainer.moe.capacity import limit_to_capacity
from trainer.moe.dispatch.base import Dispatcher, LendExperts, RunExperts
from trainer.moe.expert_places import ExpertPlaces
from trainer.moe.expert_similarity import ExpertOutputs
from trainer.moe.experts import Experts
from trainer.moe.layer_options import CapacityConfig
from trainer.moe.routing import Router, RouterOutput, RoutingContext
from trainer.moe.stats import MoEStats, collect_stats

# B sequences, S tokens each, T = B * S, R rows, D d_model.


class InFlight(NamedTuple):
    """A micro-batch inside the layer, whose tokens travel to their experts or back. FSDP2 looks into named tuples."""

    rows: Any
    """Rows of the dispatcher, on their way there or back."""
    shared: Tensor | None
    """(B, S, D) of the shared experts."""
    shape: torch.Size
    """(B, S, D)."""
    dtype: torch.dtype
    """Dtype of the output."""
    collect: Callable[..., MoEStats]
    """Returns the statistics."""


class MoE(nn.Module):
    """Mixture-of-experts layer, which replaces the feed-forward network of a block."""

    def __init__(
        self,
        router: Router,
        experts: Experts,
        dispatcher: Dispatcher,
        capacity: CapacityConfig,
        shared: nn.Module | None = None,
        *,
        layer: int = 0,
        needs_importance: bool = False,
        needs_expert_similarity: bool = False,
    ) -> None:
        """Create the layer.

        Args:
            router: assigns experts to tokens.
            experts: the local ones.
            dispatcher: sends rows to experts and combines the outputs.
            capacity: limits the rows per expert.
            shared: applied to every token in addition.
            layer: index of the block; separates the random orders of different layers.
            needs_importance: a loss uses the sums of combine weights.
            needs_expert_similarity: a loss compares the outputs of a token's experts.
        """
        super().__init__()
        self.router, self.experts, self.shared = router, experts, shared
        self.dispatcher, self.capacity, self.layer = dispatcher, capacity, layer
        self.needs_importance, self.needs_expert_similarity = needs_importance, needs_expert_similarity
        self.places: ExpertPlaces | None = None
        """Places of experts by which the dispatcher numbers them; None: their numbers."""
        self.lend: LendExperts | None = None
        """Sends weights of experts to the ranks that have copies of them; None: there are none."""

    def forward(self, x: Tensor, context: RoutingContext) -> tuple[Tensor, MoEStats]:
        """Return the layer's output for x (B, S, D), 0 for padding, and its statistics."""
        borrowed = None if self.lend is None else self.lend(self.experts)
        sent = self.begin(x, context)
        return self.finish(sent._replace(rows=self._compute(sent.rows, self._with_copies(borrowed))))

    def begin(self, x: Tensor, context: RoutingContext) -> InFlight:
        """Route the tokens of x (B, S, D) and start to send them; shared experts compute while they travel."""
        tokens = x.flatten(0, 1)  # (T, D)
        routed = self.router(tokens, context)
        if not isinstance(routed, RouterOutput):
            cls = type(self.router)
            raise ConfigError(
                f"model.moe.router: {cls.__module__}:{cls.__qualname__}.forward returned a "
                f"{type(routed).__qualname__}, not a {RouterOutput.__module__}.RouterOutput"
            )
        if context.given is not None and routed.live_choice is None:
            cls = type(self.router)
            raise ConfigError(
                f"model.moe.router: {cls.__module__}:{cls.__qualname__} was given experts and returned no live_choice, "
                "so it has not used them; pass its choice through context.chosen, or do without train.routing_replay"
            )
        decision = limit_to_capacity(routed.decision, self.capacity, context, salt=self.layer)
        placed = decision if self.places is None else self.places.placed(decision)
        # A token's outputs that are compared are dispatched apart, by `compute`.
        rows = (tokens, placed) if self.needs_expert_similarity else self.dispatcher.begin(tokens, placed)
        return InFlight(
            rows=rows,
            shared=self._apply_shared(x, context),
            shape=x.shape,
            dtype=torch.promote_types(x.dtype, decision.combine_weight.dtype),
            collect=partial(collect_stats, routed, decision, context, needs_importance=self.needs_importance),
        )

    def compute(self, rows: Sequence[Any]) -> list[Any]:
        """Apply the experts to the tokens of some micro-batches, one after another, and start to send them back.

        The weights that this needs from other ranks are sent once for all of them.
        """
        experts = self._with_copies(None if self.lend is None else self.lend(self.experts))
        return [self._compute(of_batch, experts) for of_batch in rows]

    def finish(self, computed: InFlight) -> tuple[Tensor, MoEStats]:
        """Wait for the outputs of a micro-batch, and return what `forward` does."""
        if self.needs_expert_similarity:
            out, expert_similarity = computed.rows
        else:
            out, expert_similarity = self.dispatcher.finish(computed.rows), None
        with self.dispatcher.step_timer.within("combine"):
            out = out.to(computed.dtype).view(computed.shape)
            out = out if computed.shared is None else out + computed.shared
        return out, computed.collect(expert_similarity=expert_similarity)

    def _compute(self, rows: Any, experts: RunExperts) -> Any:
        if not self.needs_expert_similarity:
            return self.dispatcher.compute(rows, experts)
        tokens, placed = rows
        outputs = ExpertOutputs.of(self.dispatcher, tokens, placed, experts)
        return outputs.sums(), outputs.similarity()

    def _with_copies(self, borrowed: Callable[[], Mapping[str, Tensor]] | None) -> RunExperts:
        return self.experts if borrowed is None else partial(self.experts, copies=borrowed())

    def _apply_shared(self, x: Tensor, context: RoutingContext) -> Tensor | None:
        """Return the outputs of the shared experts (B, S, D), 0 for padding; None without them."""
        if self.shared is None:
            return None
        return self.shared(x) * context.valid.view(*x.shape[:2], 1)
