"""Law: the de-duplicated all-to-all sends as few tokens as routing allows, forward and backward."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.builders import make_context
from tests.ranks import Ranks, mesh_here
from tests.registries import DISPATCHERS
from trainer.distributed.collectives import Group
from trainer.distributed.rank_layout import even_slice
from trainer.moe.capacity import limit_to_capacity
from trainer.moe.layer_options import CapacityConfig
from trainer.moe.routing import RoutingDecision
from trainer.ops.kernels import run_experts

TOKENS, NUM_EXPERTS, TOP_K, D = 96, 32, 8, 6


def on_a_rank(kind: str, factor: float | None) -> dict[str, Any]:
    """Return the rows of tokens that a rank sends to others, each way, and those that its decision needs."""
    mesh = mesh_here(ep_size=dist.get_world_size())
    size, me = mesh.ep.size, mesh.ep.index
    first, end = even_slice(NUM_EXPERTS, size, me)
    generator = torch.Generator().manual_seed(me)
    chosen = torch.stack([torch.randperm(NUM_EXPERTS, generator=generator)[:TOP_K] for _ in range(TOKENS)])
    weight = torch.rand(TOKENS, TOP_K, generator=generator).requires_grad_()
    x = torch.randn(TOKENS, D, generator=generator).requires_grad_()
    valid = torch.arange(TOKENS) < TOKENS - 3
    decision = RoutingDecision.from_top_k(chosen, weight, num_experts=NUM_EXPERTS, valid=valid)
    decision = limit_to_capacity(decision, CapacityConfig(factor=factor), make_context(1, TOKENS, valid))
    w_in, w_out = torch.randn(end - first, 8, D), torch.randn(end - first, D, 4)

    sent: list[int] = []
    whole = Group.issue_all_to_all

    def counted(self: Group, x: Tensor, send: Sequence[int], receive: Sequence[int]) -> Any:
        if x.shape[1:] == (D,):
            sent.append(sum(send) - send[me])
        return whole(self, x, send, receive)

    def experts(
        x: Tensor, expert_index: Tensor, weight: Tensor, *, num_rows: int | None = None, part: None = None
    ) -> Tensor:
        return run_experts("loop", x, expert_index, weight, w_in, w_out, "swiglu", num_rows=num_rows)

    Group.issue_all_to_all = counted  # type: ignore[method-assign]
    try:
        y = DISPATCHERS[kind]().build(mesh, NUM_EXPERTS).forward(x, decision, experts)
        y.sum().backward()
    finally:
        Group.issue_all_to_all = whole  # type: ignore[method-assign]
    kept = [
        (int(t), int(e)) for t, e, k in zip(decision.token_index, chosen.flatten(), decision.kept, strict=True) if k
    ]
    rank_of = [rank for rank in range(size) for _ in range(*even_slice(NUM_EXPERTS, size, rank))]
    pairs = [(t, rank_of[e]) for t, e in kept]
    to_rank = [len({t for t, r in pairs if r == rank}) for rank in range(size)]
    return {"sent": sent, "to_rank": to_rank, "assignments": sum(r != me for _, r in pairs)}


@pytest.mark.parametrize("factor", [None, 1.0])
@pytest.mark.parametrize("world_size", [3, 8])
def test_a_token_travels_once_to_each_rank_that_has_any_of_its_experts(
    ranks: Ranks, world_size: int, factor: float | None
) -> None:
    """Forward to the experts and back, and backward the same two ways."""
    found = ranks.run(world_size, on_a_rank, "deduplicated_all_to_all", factor)
    for me, mine in enumerate(found):
        there = sum(mine["to_rank"]) - mine["to_rank"][me]
        back = sum(other["to_rank"][me] for rank, other in enumerate(found) if rank != me)
        assert mine["sent"] == [there, back, there, back]
    copies = sum(sum(mine["to_rank"]) for mine in found) / sum(t for mine in found for t in [TOKENS - 3])
    print(f"{world_size} ranks, capacity factor {factor}: {copies:.2f} copies of a token instead of {TOP_K}")


def test_all_to_all_sends_each_assignment(ranks: Ranks) -> None:
    """The count that is saved: without de-duplication a row travels for each of a token's experts."""
    found = ranks.run(8, on_a_rank, "all_to_all", None)
    for mine in found:
        assert mine["sent"][0] == mine["assignments"] > sum(mine["to_rank"])
