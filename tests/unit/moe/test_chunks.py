"""Renumbering of experts for chunked communication."""

import torch

from trainer.moe.dispatch.chunks import Chunks
from trainer.moe.routing import RoutingDecision


def test_what_is_sent_for_one_part_lies_together() -> None:
    """With three chunks the new order is not its own inverse; 6 and 7 are null experts, which are on no rank."""
    chunks = Chunks.of([(0, 3), (3, 6)], 3)
    assert chunks.bounds == [[(0, 1), (1, 2)], [(2, 3), (3, 4)], [(4, 5), (5, 6)]]
    assert chunks.of_rank == [[(0, 1), (1, 2), (2, 3)]] * 2
    expert_index = torch.tensor([[0, 1], [2, 3], [4, 5], [6, 7]])
    decision = RoutingDecision.from_top_k(expert_index, torch.ones(4, 2), num_experts=8, valid=torch.ones(4).bool())
    assert chunks.renumbered(decision).expert_index.tolist() == [0, 2, 4, 1, 3, 5, 6, 7]
