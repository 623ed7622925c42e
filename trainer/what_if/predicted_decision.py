"""Decide for traced tokens at another k and capacity, by the code that training uses.

# T tokens, k experts per token, A assignments, L MoE layers, m experts listed for each token.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from trainer.errors import ConfigError
from trainer.moe.capacity import limit_to_capacity
from trainer.moe.layer_options import CapacityConfig
from trainer.moe.routers.top_k import normalized
from trainer.moe.routing import RoutingDecision
from trainer.what_if.traced_passes import Trace, TracedPass


@dataclass(frozen=True, slots=True, kw_only=True)
class DecidedPass:
    """Decisions of the L MoE layers in one forward pass, after drops."""

    traced: TracedPass
    decisions: Sequence[RoutingDecision]

    def dropped(self, layer: int, among: Tensor) -> int:
        """Return the number of dropped assignments of some tokens (T,)."""
        decision = self.decisions[layer]
        return int((among[decision.token_index] & ~decision.kept).sum())


def decide_from_trace(trace: Trace, *, top_k: int, capacity: CapacityConfig) -> Iterator[DecidedPass]:
    """Yield what each pass decides, if every layer had the input that it had in the trace."""
    layers = range(len(trace.model.moe_layers))
    for traced in trace.passes():
        decisions = [predicted_decision(trace, traced, layer, top_k=top_k, capacity=capacity) for layer in layers]
        yield DecidedPass(traced=traced, decisions=decisions)


def predicted_decision(
    trace: Trace, traced: TracedPass, layer: int, *, top_k: int, capacity: CapacityConfig
) -> RoutingDecision:
    """Return what a MoE layer, counted from 0 among them, keeps of a pass: the k best experts within the capacity.

    The layer's input is that of the traced model. A capacity drops nothing before the first MoE layer, so there it is
    also the input of an evaluation at that capacity.
    """
    facts, listed = trace.facts, traced.listed[:, layer, :top_k].contiguous()
    weight = traced.values[:, layer, :top_k].contiguous()
    if facts.num_ranked:
        weight = (normalized(weight) if facts.normalize else weight) * facts.scale
    decision = RoutingDecision.from_top_k(
        listed, weight, num_experts=trace.model.num_experts, valid=traced.context.valid
    )
    return limit_to_capacity(decision, capacity, traced.context, salt=trace.model.moe_layers[layer])


def check_top_ks(trace: Trace, top_ks: list[int]) -> None:
    """Check that a trace has the experts of other numbers per token.

    Raises:
        ConfigError: naming the k that it has not.
    """
    facts, model = trace.facts, trace.model
    for top_k in top_ks:
        if not facts.num_ranked and top_k != model.top_k:
            raise ConfigError(
                f"--top-k: {model.router} does not rank experts by scores of its own, so its trace has only the "
                f"{model.top_k} that it chose; leave the option out"
            )
        if top_k > facts.largest_top_k:
            raise ConfigError(
                f"--top-k: {top_k} is more than {facts.largest_top_k}, for which this trace lists experts; trace with "
                f"--choices {top_k}, if the router allows it"
            )
