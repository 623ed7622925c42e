"""Count what dispatchers send for one MoE layer in one step, forward: rows of the width of a token.

# T tokens of a rank, G ranks of an expert-parallel group, each of which sends and has experts.
"""

from typing import Literal

import torch
from torch import Tensor

from trainer.moe.routing import RoutingDecision

SendingDispatcher = Literal["all_to_all", "padded_all_to_all", "deduplicated_all_to_all", "all_gather"]


def rows_to_ranks(decision: RoutingDecision, owner: Tensor, num_ranks: int) -> Tensor:
    """Return (G,) the rows of a sender's decision for the experts of each rank, given the rank (E,) of each expert."""
    is_row = decision.kept & (decision.expert_index < decision.num_experts)
    return owner[decision.expert_index[is_row]].bincount(minlength=num_ranks)


def copies_to_ranks(decision: RoutingDecision, owner: Tensor, num_ranks: int) -> Tensor:
    """Return (G,) the tokens of a sender that have any expert on each rank."""
    is_row = decision.kept & (decision.expert_index < decision.num_experts)
    pair = decision.token_index[is_row] * num_ranks + owner[decision.expert_index[is_row]]
    return (pair.unique() % num_ranks).bincount(minlength=num_ranks)


def sent_rows(
    dispatcher: SendingDispatcher, rows: Tensor, copies: Tensor, owner: Tensor, *, tokens: int, capacity: int | None
) -> Tensor:
    """Return (G,) the rows that each rank sends to others, tokens there and outputs back.

    Combine weights, expert ids and counts, which travel beside them, are not counted. `capacity` is that of a decision
    with static sizes.

    Args:
        dispatcher: what sends.
        rows: (G, G) rows from each rank for the experts of each rank.
        copies: (G, G) tokens, each counted once for each rank.
        owner: (E,) rank of each expert.
        tokens: T, padding included.
        capacity: rows of each sender for an expert. None: dropless.
    """
    size = len(rows)
    if dispatcher == "all_gather":  # every token to every rank, and every output too
        return (size - 1) * (tokens + rows.sum(0))
    there = rows
    if dispatcher == "deduplicated_all_to_all":
        there = copies
    elif dispatcher == "padded_all_to_all" and capacity is not None:
        there = (owner.bincount(minlength=size) * capacity).expand(size, size)
    there = there * ~torch.eye(size, dtype=torch.bool)
    return there.sum(1) + there.sum(0)
