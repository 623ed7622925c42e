"""Tests for the routing gap: routing of some rows compared with the optimum."""

from typing import Any

import pytest
import torch

from tests.builders import make_batch, make_engine, tiny_model_config
from tests.ranks import Ranks, mesh_here
from tests.registries import LEARNED_ROUTERS
from trainer.distributed.mesh import Mesh
from trainer.engine.native import NativeEngine
from trainer.evaluation.routing_gap import RoutingGap, routing_gap

ALONE = Mesh.of_one().world


def _gap(router: dict[str, Any], **moe: Any) -> tuple[NativeEngine, RoutingGap | None]:
    config = tiny_model_config({"router": router, **moe})
    engine = make_engine(config, dtype=torch.float64, seed=1)
    assert config.moe is not None
    batches = [make_batch(3, 8, seed=seed, first_sample=3 * seed, ragged=True) for seed in range(2)]
    return engine, routing_gap(engine, batches, config.moe, seed=1, world=ALONE)


@pytest.mark.parametrize("kind", LEARNED_ROUTERS)
def test_no_router_beats_the_optimum(kind: str) -> None:
    _, found = _gap({"kind": kind})
    assert found is not None
    record = found.record()
    assert record["routing_gap"] >= -1e-12
    assert record["routing_gap/drop_rate"] >= record["routing_gap/optimum_drop_rate"] - 1e-12
    assert [layer.gap >= -1e-12 for layer in found.layers] == [True, True]
    assert {"routing_gap/layer_00", "routing_gap/layer_01"} <= record.keys()


def test_the_linear_programme_router_has_no_gap() -> None:
    _, found = _gap({"kind": "linear_program"})
    assert found is not None and found.record()["routing_gap"] == 0
    assert found.record()["routing_gap/drop_rate"] == found.record()["routing_gap/optimum_drop_rate"]


def test_a_crowded_top_k_router_has_a_large_gap() -> None:
    config = tiny_model_config({"router": {"kind": "top_k", "top_k": 1, "normalize": False}})
    engine, batch = make_engine(config, dtype=torch.float64, seed=1), make_batch(3, 8)
    with torch.no_grad():
        for layer in engine.model.moe_layers():
            layer.router.get_parameter("gate.weight").zero_()  # all scores equal: everyone takes expert 0
    assert config.moe is not None
    found = routing_gap(engine, [batch], config.moe, seed=1, world=ALONE)
    assert found is not None
    record = found.record()
    assert record["routing_gap"] == pytest.approx(0.75) and record["routing_gap/drop_rate"] == pytest.approx(0.75)
    assert record["routing_gap/optimum"] == pytest.approx(0.25)
    assert record["routing_gap/optimum_drop_rate"] == 0


def test_prices_are_recorded_with_the_learned_bias() -> None:
    engine, found = _gap({"kind": "bias_balanced"})
    assert found is not None and found.bias is not None
    assert [len(found.prices), len(found.prices[0]), len(found.bias), len(found.bias[0])] == [2, 4, 2, 4]
    for row in (*found.prices, *found.bias):
        assert sum(row) == pytest.approx(0, abs=1e-5)
    assert set(found.experts()) == {"prices", "bias"}
    engine.model.moe_layers()[0].router.get_buffer("bias").add_(torch.tensor([1.0, 0, 0, 0]))
    assert engine.model.config.moe is not None
    again = routing_gap(engine, [make_batch(3, 8)], engine.model.config.moe, seed=1, world=ALONE)
    assert again is not None and again.bias is not None and again.bias[0] == [0.75, -0.25, -0.25, -0.25]


NULLS = {"top_k": 4, "null_experts": 6}


@pytest.mark.parametrize("kind", ["top_k", "bias_balanced", "noisy_top_k", "cosine"])
def test_null_experts_are_uncapped_choices(kind: str) -> None:
    _, found = _gap({"kind": kind, **NULLS}, capacity={"factor": 4.0})
    assert found is not None
    record = found.record()  # room for every token at every expert: each gets the best that it can, and nothing else is
    assert abs(record["routing_gap"]) < 1e-12
    assert record["routing_gap/drop_rate"] == record["routing_gap/optimum_drop_rate"] == 0
    assert [len(prices) for prices in found.prices] == [5, 5]
    assert found.bias is None or [len(bias) for bias in found.bias] == [5, 5]
    _, narrow = _gap({"kind": kind, **NULLS}, capacity={"factor": 0.25, "min": 1})
    assert narrow is not None
    tight = narrow.record()
    assert tight["routing_gap"] >= -1e-12 and tight["routing_gap/drop_rate"] > 0.05
    assert tight["routing_gap/drop_rate"] >= tight["routing_gap/optimum_drop_rate"]
    assert all(prices[-1] == min(prices) for prices in narrow.prices), "room without end is worth nothing"


def test_drops_equal_the_layer_s_with_null_experts() -> None:
    config = tiny_model_config({"router": {"kind": "top_k", **NULLS}, "capacity": {"factor": 0.5, "min": 1}})
    engine, batch = make_engine(config, dtype=torch.float64, seed=1), make_batch(3, 8)
    assert config.moe is not None
    found = routing_gap(engine, [batch], config.moe, seed=1, world=ALONE)
    evaluated = engine.eval_loss(batch, dropless=False).routing
    assert found is not None and evaluated is not None
    wanted = NULLS["top_k"] * evaluated.tokens
    assert [layer.wanted - layer.kept for layer in found.layers] == evaluated.dropped.tolist()
    assert [layer.wanted for layer in found.layers] == wanted.tolist()


def on_a_rank(router: dict[str, Any]) -> RoutingGap | None:
    config = tiny_model_config({"router": router})
    assert config.moe is not None
    mesh = mesh_here()
    engine = make_engine(config, dtype=torch.float64, seed=1, mesh=mesh)
    batches = [make_batch(3, 8, seed=seed, first_sample=3 * seed, ragged=True) for seed in range(2)]
    return routing_gap(engine, batches, config.moe, seed=1, world=mesh.world)


@pytest.mark.parametrize("router", [{"kind": "bias_balanced", "null_experts": 2}, {"kind": "hash"}], ids=str)
def test_ranks_share_the_programmes_and_agree_with_one_process(ranks: Ranks, router: dict[str, Any]) -> None:
    _, alone = _gap(router)
    for found in ranks.run(3, on_a_rank, router):
        assert found == alone


@pytest.mark.parametrize("kind", ["hash", "random", "round_robin"])
def test_routers_without_scores_have_no_gap(kind: str) -> None:
    assert _gap({"kind": kind})[1] is None


def test_measuring_changes_nothing() -> None:
    config = tiny_model_config({"router": {"kind": "bias_balanced", "jitter": 0.1}})
    assert config.moe is not None
    one, other = (make_engine(config, dtype=torch.float64, seed=1) for _ in range(2))
    for step in range(3):
        batch = make_batch(4, 8, seed=step, first_sample=4 * step)
        routing_gap(one, [make_batch(2, 8, seed=9)], config.moe, seed=1, world=ALONE)
        assert one.train_step([batch], lr=1e-2).loss == other.train_step([batch], lr=1e-2).loss
    for (name, a), b in zip(one.model.state_dict().items(), other.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
