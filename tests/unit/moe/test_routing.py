"""The number of rows of a decision is known to the host exactly where no choice can change it."""

from typing import Any

import pytest
import torch
from pydantic import TypeAdapter

from tests.builders import make_batch, make_model, tiny_model_config
from trainer.contracts.router_inputs import B, S, context_of, make_router, make_x
from trainer.models.routing_context import routing_context
from trainer.moe.capacity import limit_to_capacity
from trainer.moe.layer_options import CapacityConfig
from trainer.moe.routers.registry import RouterConfig
from trainer.moe.routing import RoutingOptions

ADAPTER: TypeAdapter[Any] = TypeAdapter(RouterConfig)
VALID = (torch.arange(S) < torch.tensor([[S], [5], [1]])).flatten()


@pytest.mark.parametrize(
    ("router", "rows_per_token"),
    [
        ({"kind": "top_k", "top_k": 3}, 3),
        ({"kind": "switch"}, 1),
        ({"kind": "dense"}, 4),
        ({"kind": "hash", "top_k": 2}, 2),
        ({"kind": "sinkhorn", "top_k": 2}, 2),
        ({"kind": "base"}, 1),
        ({"kind": "gshard", "random_second": False}, 2),
        ({"kind": "gshard"}, None),
        ({"kind": "top_k", "null_experts": 2}, None),
    ],
    ids=str,
)
def test_rows_of_a_fixed_k_are_known(router: dict[str, Any], rows_per_token: int | None) -> None:
    made = make_router(ADAPTER.validate_python(router), 4)
    decision = made(make_x(), context_of(is_training=True, valid=VALID)).decision
    assert decision.num_rows == (None if rows_per_token is None else rows_per_token * int(VALID.sum()))
    if rows_per_token is not None:
        assert decision.num_rows == int(decision.kept.sum())


def test_what_drops_does_not_know_its_rows() -> None:
    decision = make_router(ADAPTER.validate_python({"kind": "top_k"}), 4)(
        make_x(), context_of(is_training=True)
    ).decision
    assert decision.num_rows == 2 * B * S
    for factor, expected in ((None, 2 * B * S), (1.0, None)):
        limited = limit_to_capacity(decision, CapacityConfig(factor=factor), context_of(is_training=True))
        assert limited.num_rows == expected


def test_a_model_gives_its_routers_the_counts_of_the_batch() -> None:
    batch = make_batch(3, 8, ragged=True)
    assert routing_context(batch, RoutingOptions()).num_valid == int(batch.valid.sum())
    stats = make_model(tiny_model_config())(batch, RoutingOptions(return_router_outputs=True)).moe
    assert [layer.routed.decision.num_rows for layer in stats if layer.routed] == [2 * int(batch.valid.sum())] * 2
