"""Expert capacity: the rows an expert accepts, and the assignments dropped beyond it. Pure, before any communication.

# T tokens, k experts per token, A assignments, E experts, B sequences of S tokens, C rows per expert and sequence.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from trainer.moe.layer_options import CapacityConfig
from trainer.moe.routing import Causality, RoutingContext, RoutingDecision
from trainer.ops.noise import uniform
from trainer.ops.select import round_mantissa


def expert_capacity(assignments: int, num_experts: int, *, factor: float, minimum: int) -> int:
    """Return C = max(minimum, ceil(factor * assignments / num_experts)).

    With `assignments` = k * S this is GShard's and Megatron's formula for one sequence; DeepSpeed, Tutel, MegaBlocks,
    OLMo-core and FastMoE each round, scale or scope it differently.
    """
    # A factor such as 1.1 is not exact in binary: 1.1 * 10 must be 11 rows, not 12.
    return max(minimum, math.ceil(factor * assignments / num_experts - 1e-9))


def capacity_causality(capacity: CapacityConfig, *, is_training: bool) -> Causality:
    """Return which other tokens can decide whether a token is kept; in evaluation `random` goes by position."""
    if capacity.factor is None:
        return "strict"
    if capacity.scope == "rank":
        return "no"  # earlier rows of the batch fill the experts before later ones
    by_position = ("position",) if is_training else ("position", "random")
    return "strict" if capacity.policy in by_position else "within_sequence"


def limit_to_capacity(
    decision: RoutingDecision, capacity: CapacityConfig, context: RoutingContext, *, salt: int = 0
) -> RoutingDecision:
    """Drop the assignments that exceed their expert's capacity; identity without a factor or under `context.dropless`.

    The returned `capacity` is static: B * C rows per expert for `scope: sequence`, C for `scope: rank`, where C is at
    most the number of assignments.

    `salt` separates the random orders of different layers.

    Source: GShard (arXiv 2006.16668) for `choice_major`; Riquelme et al. 2021 (arXiv 2106.05974) for `probability`;
        Kim et al. 2021 (arXiv 2109.10465) for `random`.
    """
    if capacity.factor is None or context.dropless:
        return decision
    if context.row_parts is not None and capacity.scope == "sequence":
        return _limit_whole_rows(decision, capacity, context, salt)
    num_groups = context.num_sequences if capacity.scope == "sequence" else 1
    num_assignments = decision.expert_index.numel()
    in_group = num_assignments // max(1, num_groups)
    per_group = expert_capacity(in_group, decision.num_experts, factor=capacity.factor, minimum=capacity.min)
    per_group = min(per_group, max(1, in_group))  # more would only waste memory
    limited = decision.kept & (decision.expert_index < decision.num_experts)
    group = context.sequence_index[decision.token_index] if num_groups > 1 else torch.zeros_like(decision.token_index)
    # Assignments that take no capacity share one additional queue, after all others.
    queue = torch.where(
        limited, group * decision.num_experts + decision.expert_index, num_groups * decision.num_experts
    )
    order = _arrival_order(decision, queue, capacity, context, salt)
    position = _position_in_queue(queue, order, num_groups * decision.num_experts + 1)
    kept = decision.kept & (~limited | (position < per_group))
    weight = decision.combine_weight
    if capacity.renormalize_after_drop:
        weight = _renormalize(decision, kept)
    return replace(decision, kept=kept, combine_weight=weight, capacity=num_groups * per_group, num_rows=None)


def _limit_whole_rows(
    decision: RoutingDecision, capacity: CapacityConfig, context: RoutingContext, salt: int
) -> RoutingDecision:
    """Drop what exceeds the capacity of whole rows, of which a part is here: all parts decide about all of a row."""
    assert decision.top_k is not None, "a capacity needs a router with a fixed k"
    shape = decision.num_tokens, decision.top_k

    def whole(x: Tensor) -> Tensor:
        """Return (B * S, ...) of whole rows."""
        return context.whole_rows(x).flatten(0, 1)

    valid, keys = whole(context.valid), context.noise_key
    num_tokens, rows = len(valid), torch.arange(context.num_sequences, device=valid.device)
    of_rows = RoutingDecision.from_top_k(
        whole(decision.expert_index.view(shape)),
        whole(decision.combine_weight.detach().view(shape)),
        num_experts=decision.num_experts,
        valid=valid,
    )
    of_rows = replace(of_rows, kept=whole(decision.kept.view(shape)).flatten())  # a router may have dropped some
    everything = replace(
        context,
        valid=valid,
        position=whole(context.position),
        sequence_index=rows.repeat_interleave(num_tokens // context.num_sequences),
        noise_key=None if keys is None else whole(keys),
        row_parts=None,
    )
    no_weights = capacity.model_copy(update={"renormalize_after_drop": False})
    limited = limit_to_capacity(of_rows, no_weights, everything, salt=salt)
    assert limited.capacity is not None, "there is a factor"
    kept = limited.kept.view(context.num_sequences, -1, decision.top_k)
    kept = decision.kept & context.own_tokens(kept).flatten()
    weight = _renormalize(decision, kept) if capacity.renormalize_after_drop else decision.combine_weight
    most = min(limited.capacity, decision.expert_index.numel())
    return replace(decision, kept=kept, combine_weight=weight, capacity=most, num_rows=None)


def _arrival_order(
    decision: RoutingDecision, queue: Tensor, capacity: CapacityConfig, context: RoutingContext, salt: int
) -> Tensor:
    """Return (A,) the order in which assignments claim capacity in their queues (A,)."""
    order = torch.arange(decision.expert_index.numel(), device=decision.expert_index.device)
    if capacity.policy == "position":
        return order  # token-major, then slot
    if capacity.policy == "random":
        if context.noise_key is None:
            return order
        drawn = uniform(context.noise_key, 1, salt=f"capacity {salt}").squeeze(-1)  # (T,)
        return drawn[decision.token_index].argsort(stable=True)
    if capacity.policy == "probability":
        return round_mantissa(decision.combine_weight.detach(), group=queue).argsort(descending=True, stable=True)
    assert decision.top_k is not None, "a capacity needs a router with a fixed k"
    return order.view(decision.num_tokens, decision.top_k).t().reshape(-1)  # all first choices, then all second


def _position_in_queue(queue: Tensor, order: Tensor, num_queues: int) -> Tensor:
    """Return (A,): the number of assignments before each one in its queue.

    #  queue  [1 0 1 1 0], order = list order   ->   position [0 0 1 2 1]
    """
    by_queue = order[queue[order].argsort(stable=True)]  # (A,) grouped by queue, in order of arrival
    lengths = queue.new_zeros(num_queues).scatter_add(0, queue, torch.ones_like(queue))  # bincount would wait
    start = lengths.cumsum(0) - lengths
    position = torch.empty_like(queue)
    position[by_queue] = torch.arange(queue.numel(), device=queue.device) - start[queue[by_queue]]
    return position


def _renormalize(decision: RoutingDecision, kept: Tensor) -> Tensor:
    """Scale each token's remaining weights to the sum of its weights before the drop."""
    weight = decision.combine_weight
    zero = weight.new_zeros(decision.num_tokens)
    before = zero.index_add(0, decision.token_index, weight * decision.kept)
    after = zero.index_add(0, decision.token_index, weight * kept)
    scale = torch.where(after > 0, before / after.where(after > 0, 1.0), 1.0)
    return weight * scale[decision.token_index]
