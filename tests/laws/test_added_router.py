"""Law: a user-defined router obeys the laws of built-in ones: plain loop, micro-batches, ranks."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests import reference
from tests.added_router import ThresholdRouterConfig
from tests.builders import make_batch, make_engine, rows_of, tiny_model_config
from tests.laws.test_router_oracles import D_FF, make_layer, make_tokens
from tests.ranks import Ranks
from trainer.data.batches.assemble import pad_rows
from trainer.distributed.flight_recorder import FlightRecorder
from trainer.distributed.mesh import Mesh, build_mesh
from trainer.distributed.rank_layout import Layout, even_slice
from trainer.models.config import ModelConfig

ROWS, SEQ_LEN, STEPS = 8, 8, 6


def test_it_equals_a_plain_loop_with_gradients() -> None:
    layer, (x, context) = make_layer({"kind": "top_k"}), make_tokens(is_training=True)
    gate = layer.router.get_parameter("gate.weight")
    layer.router = ThresholdRouterConfig(threshold=0.55).build(d_model=x.shape[-1], num_experts=4, layer=0).double()
    layer.router.get_parameter("gate.weight").data.copy_(gate.data)
    gate, tokens = layer.router.get_parameter("gate.weight"), x.flatten(0, 1)
    experts, weights = [], []
    for t, token in enumerate(tokens):
        scores = [1 / (1 + torch.exp(-(token * row).sum())) for row in gate]
        best = max(range(4), key=lambda e: float(scores[e].detach()))
        mine = [e for e in range(4) if e == best or scores[e] > 0.55] if context.valid[t] else []
        experts.append(mine)
        weights.append([scores[e] for e in mine])
    none = torch.zeros(len(tokens), 4)
    routed = reference.Routed(experts=experts, weights=weights, probs=none, logits=none)
    assert {len(mine) for mine in experts} > {0, 1}, "some tokens have several"
    y, _ = layer(x, context)
    oracle = reference.moe_output(tokens, routed, layer.experts.w_in, layer.experts.w_out, "swiglu")
    torch.testing.assert_close(y.flatten(0, 1), oracle, rtol=0, atol=1e-10)
    inputs = [x, gate, layer.experts.w_in, layer.experts.w_out]
    assert layer.experts.w_out.shape[-1] == D_FF
    ours, theirs = (torch.autograd.grad(v.square().sum(), inputs) for v in (y, oracle))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def _config() -> ModelConfig:
    """A model with the user-defined router, which is not in the registry."""
    config = tiny_model_config({"num_experts": 8, "balance": {"coef": 0.1}})
    assert config.moe is not None
    moe = config.moe.model_copy(update={"router": ThresholdRouterConfig()})
    return config.model_copy(update={"moe": moe})


def train(layout: Layout, mesh: Mesh, num_pieces: int) -> torch.Tensor:
    """Loss, balance loss, gradient norm and counts of every step."""
    engine = make_engine(_config(), dtype=torch.float64, seed=5, mesh=mesh)
    curve = []
    for step in range(STEPS):
        batch = make_batch(ROWS, SEQ_LEN, seed=step, first_sample=ROWS * step, ragged=step % 2 == 1)
        first, end = even_slice(ROWS, layout.world_size, layout.rank)
        mine = pad_rows(rows_of(batch, first, end), ROWS // layout.world_size)
        size = len(mine.tokens) // num_pieces
        result = engine.train_step([rows_of(mine, i * size, (i + 1) * size) for i in range(num_pieces)], lr=3e-3)
        assert result.routing is not None and result.balance_loss is not None
        counts = result.routing.counts.flatten().tolist()
        curve.append([result.loss, result.balance_loss, result.z_loss or 0.0, result.grad_norm, *counts])
    return torch.tensor(curve, dtype=torch.float64)


def on_a_rank(ep_size: int) -> torch.Tensor:
    """Run `train` on one of several ranks."""
    layout = Layout(world_size=dist.get_world_size(), rank=dist.get_rank(), ep_size=ep_size, ranks_per_node=2)
    return train(layout, build_mesh(layout, FlightRecorder()), 1)


def test_it_learns_the_same_in_micro_batches() -> None:
    whole, pieces = (train(Layout(), Mesh.of_one(), n) for n in (1, 4))
    torch.testing.assert_close(pieces, whole, rtol=0, atol=1e-12)
    assert whole[-1, 0] < whole[0, 0]


@pytest.mark.parametrize(("world_size", "ep_size"), [(2, 1), (2, 2), (4, 4)])
def test_it_learns_the_same_on_many_ranks(ranks: Ranks, world_size: int, ep_size: int) -> None:
    alone: Any = train(Layout(), Mesh.of_one(), 1)
    for mine in ranks.run(world_size, on_a_rank, ep_size):
        torch.testing.assert_close(mine, alone, rtol=1e-9, atol=1e-9)
