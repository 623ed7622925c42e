"""Bytes and messages of collectives, against sums by hand; and those of the dispatchers on real ranks."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.ranks import Ranks, mesh_here
from trainer.lab.costs.cost_options import LayerShape, Routing
from trainer.lab.costs.dispatch_entries import build_dispatch_entries
from trainer.lab.costs.message_counter import MessageCounter, Sent

SHAPE = LayerShape(num_experts=4, top_k=2, d_model=8, d_ff=4, tokens=16, dtype="float32")


def _sent(kind: str) -> Sent:
    rank, size = dist.get_rank(), dist.get_world_size()
    x = torch.ones(6, 5)
    with MessageCounter(5) as counter:
        if kind == "all_to_all":
            rows = [[1, 2, 3], [2, 0, 4], [3, 4, 0]]  # symmetric, so that what is sent is what arrives
            x = torch.ones(sum(rows[rank]), 5, requires_grad=True)
            out = torch.empty_like(x)
            dist.all_to_all_single(out, x.detach(), rows[rank], rows[rank])
        elif kind == "weights":
            x = torch.ones(3, 4)  # not of the width of a token
            dist.all_to_all_single(torch.empty_like(x), x)
        elif kind == "counts":
            dist.all_gather([torch.empty(4, dtype=torch.int64) for _ in range(size)], torch.arange(4))
        elif kind == "all_reduce":
            dist.all_reduce(x)
        elif kind == "barrier":
            dist.barrier()
    return counter.sent


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        # bytes of rows, other bytes and messages of each rank
        ("all_to_all", [(5 * 20, 0, 2), (6 * 20, 0, 2), (7 * 20, 0, 2)]),
        ("weights", [(0, 2 * 16, 2)] * 3),
        ("counts", [(0, 2 * 32, 2)] * 3),
        ("all_reduce", [(0, 120 * 4 // 3, 2)] * 3),
        ("barrier", [(0, 0, 0)] * 3),
    ],
)
def test_a_collective_counts_what_goes_to_others(ranks: Ranks, kind: str, expected: list[Any]) -> None:
    sent = ranks.run(3, _sent, kind)
    assert [(one.row_bytes, one.other_bytes, one.messages) for one in sent] == expected


def _facts(dispatchers: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    mesh = mesh_here(ep_size=dist.get_world_size())
    cpu = torch.device("cpu")
    entries = build_dispatch_entries(mesh, cpu, SHAPE, Routing("balanced"), (), "loop", dispatchers, 0)
    return {name: entry.facts() for name, entry in entries.items()}


def test_no_dispatcher_sends_fewer_bytes_than_the_fewest_possible(ranks: Ranks) -> None:
    of_ranks = ranks.run(2, _facts, ("all_to_all", "deduplicated_all_to_all"))
    for facts in of_ranks:
        least = facts["all_to_all"]["least_row_bytes_per_token"]
        assert 0 < least <= facts["all_to_all"]["row_bytes_per_token"]
        assert facts["deduplicated_all_to_all"]["row_bytes_per_token"] == least
        assert facts["all_to_all"]["messages"] > 0 and facts["all_to_all"]["saved_bytes_per_token"] > 0
