"""Law: the number of ranks and the placement of experts do not change what is learned."""

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.builders import make_batch, make_engine, make_packed_batch, share_of, tiny_model_config
from tests.ranks import Ranks
from tests.registries import DISPATCHERS, ROUTERS, router_sections
from trainer.checkpoint.state import TrainState
from trainer.data.batches.batch import Batch
from trainer.distributed.flight_recorder import FlightRecorder
from trainer.distributed.mesh import Mesh, build_mesh
from trainer.distributed.rank_layout import Layout
from trainer.engine.native import NativeEngine
from trainer.moe.dispatch.registry import ExchangeOptions
from trainer.parallel.config import ParallelConfig
from trainer.parallel.expert_placement import ExpertPlacement, contiguous_placement, write_placement

DEDUPLICATED = "deduplicated_all_to_all"
STEPS, ROWS, SEQ_LEN = 6, 7, 8  # 7 rows: not divisible by any number of ranks used here

LAYOUTS = {
    "2 ranks, ep 1": (2, 1),
    "2 ranks, ep 2": (2, 2),
    "3 ranks, ep 3": (3, 3),
    "4 ranks, ep 2": (4, 2),
    "4 ranks, ep 4": (4, 4),
}

MODELS: dict[str, dict[str, Any]] = {
    "dropless": {},
    "previous_step": {"balance": {"coef": 0.1, "counts": "previous_step"}},
    "sequence": {"balance": {"coef": 0.1, "scope": "sequence"}},
    "no coefficient, logged all the same": {"balance": {"coef": 0.0}},
    "bias_balanced, jitter, capacity": {
        "router": {"kind": "bias_balanced", "jitter": 0.3, "bias_update_rate": 0.05},
        "capacity": {"factor": 1.0, "min": 1},
    },
    "shared expert, dense router": {"router": {"kind": "dense"}, "num_shared_experts": 1},
}

OTHER_ROUTERS: dict[str, dict[str, Any]] = {
    "gshard, random tokens": {
        "router": {"kind": "gshard"},
        "capacity": {"factor": 1.0, "min": 1, "policy": "random"},
    },
    "noisy_top_k, importance, load": {
        "router": {"kind": "noisy_top_k"},
        "cv_squared": {"importance_coef": 0.3, "load_coef": 0.3},
    },
    "k drawn in every step": {
        "router": {"kind": "top_k", "top_k_choices": [1, 2, 4]},
        "capacity": {"factor": 1.0, "min": 1},
    },
    "a bias over null experts": {
        "router": {"kind": "bias_balanced", "top_k": 3, "null_experts": 3, "bias_update_rate": 0.05},
        "balance": {"coef": 0},
    },
    "null experts": {"router": {"kind": "top_k", "top_k": 3, "null_experts": 3}},
    "device balance, diversity": {"device_balance": {"coef": 0.2, "groups": 4}, "diversity_coef": 0.5},
    "mixture_of_depths": {"router": {"kind": "mixture_of_depths", "capacity": 0.5}, "num_experts": 1},
}
OTHER_ROUTERS |= router_sections(without=[*MODELS.values(), *OTHER_ROUTERS.values()])


def test_every_router_is_under_the_law() -> None:
    models: list[dict[str, Any]] = [*MODELS.values(), *OTHER_ROUTERS.values()]
    assert {moe.get("router", {}).get("kind", "top_k") for moe in models} == set(ROUTERS)


def _engine(moe: dict, mesh: Mesh, parallel: dict, *, is_packed: bool) -> NativeEngine:
    config = tiny_model_config({"num_experts": 8, "balance": {"coef": 0.1}, **moe}, document_mask=is_packed)
    section = ParallelConfig.model_validate(parallel)
    return make_engine(config, dtype=torch.float64, seed=5, grad_clip=0.5, mesh=mesh, parallel=section)


def _share(step: int, layout: Layout, num_pieces: int, *, is_packed: bool) -> list[Batch]:
    """This rank's rows of a step, in the same number of micro-batches on every rank."""
    if is_packed:
        whole = make_packed_batch(ROWS, SEQ_LEN, seed=step, first_sample=ROWS * step)
    else:
        whole = make_batch(
            ROWS, SEQ_LEN, seed=step, first_sample=ROWS * step, ragged=step % 2 == 1, repeats=step % 4 in (1, 2)
        )
    return share_of(whole, layout, num_pieces)


def train(layout: Layout, moe: dict, parallel: dict, num_pieces: int, is_packed: bool) -> dict[str, Any]:
    """Train some steps; return the metrics of each, and this rank's state afterwards."""
    mesh = build_mesh(layout, FlightRecorder())
    engine = _engine(moe, mesh, parallel, is_packed=is_packed)
    curve = []
    for step in range(STEPS):
        result = engine.train_step(_share(step, layout, num_pieces, is_packed=is_packed), lr=3e-3)
        routing = result.routing
        assert routing is not None
        entropy = 0.0 if routing.entropy_sum is None else float(routing.entropy_sum.sum())
        curve.append([result.loss, result.balance_loss or 0.0, result.z_loss or 0.0, result.grad_norm, entropy])
        curve[-1].append(sum(result.extra_losses.values()))
        curve[-1] += [float(result.num_tokens), *routing.dropped.tolist(), *routing.counts.flatten().tolist()]
    curve = torch.tensor(curve, dtype=torch.float64)
    return {"curve": curve, "state": engine.state(), "repeated": engine.repeated_steps}


@cache
def alone_with(moe: str, is_packed: bool) -> dict[str, Any]:
    """Return what one process learns, once for all layouts; `moe` is JSON."""
    return train(Layout(), json.loads(moe), {}, 1, is_packed)


def on_a_rank(ep_size: int, *args: Any) -> dict[str, Any]:
    """Run `train` on one of several ranks."""
    layout = Layout(world_size=dist.get_world_size(), rank=dist.get_rank(), ep_size=ep_size, ranks_per_node=2)
    return train(layout, *args)


def _whole(states: list[TrainState]) -> dict[str, torch.Tensor]:
    """Assemble the ranks' slices, and check that replicas agree bit for bit."""
    whole: dict[str, torch.Tensor] = {}
    filled: dict[str, torch.Tensor] = {}
    for state in states:
        for name, part in state.slices.items():
            tensor = whole.setdefault(name, torch.empty(part.global_shape, dtype=part.tensor.dtype))
            seen = filled.setdefault(name, torch.zeros(part.global_shape, dtype=torch.bool))
            here = [start + i for _, start, length in part.spans for i in range(length)] if part.tensor.dim() else ...
            assert torch.equal(tensor[here][seen[here]], part.tensor[seen[here]]), f"copies of {name} differ"
            tensor[here], seen[here] = part.tensor, True
    assert all(seen.all() for seen in filled.values()), "every expert is somewhere"
    return whole


def _compare(
    ranks: Ranks,
    layout: tuple[int, int],
    moe: dict,
    parallel: dict,
    *,
    num_pieces: int = 1,
    is_packed: bool = False,
) -> list[dict[str, Any]]:
    """Compare a layout with one process; return what `train` returned on each rank."""
    world_size, ep_size = layout
    alone = alone_with(json.dumps(moe), is_packed)
    assert alone["curve"][-3:, 0].mean() < alone["curve"][:3, 0].mean()
    together = ranks.run(world_size, on_a_rank, ep_size, moe, parallel, num_pieces, is_packed)
    for mine in together:
        torch.testing.assert_close(mine["curve"], alone["curve"], rtol=1e-9, atol=1e-9)
        assert torch.equal(mine["curve"], together[0]["curve"]), "all ranks report the same"
    whole, oracle = _whole([mine["state"] for mine in together]), _whole([alone["state"]])
    assert whole.keys() == oracle.keys()
    for name in oracle:
        torch.testing.assert_close(
            whole[name], oracle[name], rtol=0, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}"
        )
    return together


@pytest.mark.one_in(3)
@pytest.mark.parametrize("moe", MODELS.values(), ids=MODELS.keys())
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_many_ranks_learn_what_one_process_learns(ranks: Ranks, layout: tuple[int, int], moe: dict) -> None:
    _compare(ranks, layout, moe, {})


@pytest.mark.one_in(3)
@pytest.mark.parametrize("moe", OTHER_ROUTERS.values(), ids=OTHER_ROUTERS.keys())
@pytest.mark.parametrize("layout", [(2, 1), (2, 2), (4, 4)], ids=["2 ranks, ep 1", "2 ranks, ep 2", "4 ranks, ep 4"])
def test_every_router_and_loss_learns_the_same_on_many_ranks(ranks: Ranks, layout: tuple[int, int], moe: dict) -> None:
    if layout[1] > moe.get("num_experts", 8):
        pytest.skip("more ranks than experts")
    _compare(ranks, layout, moe, {})


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_sharded_weights_learn_the_same(ranks: Ranks, layout: tuple[int, int]) -> None:
    _compare(ranks, layout, MODELS["bias_balanced, jitter, capacity"], {"data": "shard"})


def test_sharded_weights_learn_the_same_under_accumulation(ranks: Ranks) -> None:
    _compare(ranks, (4, 2), MODELS["dropless"], {"data": "shard"}, num_pieces=2)


@pytest.mark.parametrize("kind", [kind for kind in DISPATCHERS if kind != "local"])
def test_every_dispatcher_learns_the_same(ranks: Ranks, kind: str) -> None:
    moe = {"capacity": {"factor": 1.0, "min": 1}, "router": {"kind": "top_k", "top_k_choices": [1, 2]}}
    chunks = {"chunks": 2} if issubclass(DISPATCHERS[kind], ExchangeOptions) else {}
    _compare(ranks, (4, 4), moe, {"dispatcher": {"kind": kind, **chunks}})


@pytest.mark.parametrize("data", ["replicate", "shard"])
def test_experts_in_chunks_learn_the_same(ranks: Ranks, data: str) -> None:
    _compare(ranks, (4, 2), MODELS["dropless"], {"dispatcher": {"kind": "all_to_all", "chunks": 3}, "data": data})


PLACED: dict[str, tuple[tuple[int, int], int, dict[str, Any], dict[str, Any], int]] = {
    "all_to_all": ((4, 2), 0, MODELS["previous_step"], {}, 1),
    "in chunks of two hops, micro-batches": (
        (4, 4),
        1,
        MODELS["dropless"],
        {"dispatcher": {"kind": "hierarchical", "chunks": 2}},
        2,
    ),
    "tokens once per rank": ((2, 2), 3, OTHER_ROUTERS["null experts"], {"dispatcher": {"kind": DEDUPLICATED}}, 1),
    "padded, uneven": (
        (3, 3),
        2,
        MODELS["bias_balanced, jitter, capacity"],
        {"dispatcher": {"kind": "padded_all_to_all"}},
        1,
    ),
    "all_gather, diversity, biases": (
        (2, 2),
        1,
        {"expert_bias": True, **OTHER_ROUTERS["device balance, diversity"]},
        {"dispatcher": {"kind": "all_gather"}},
        1,
    ),
    "a row budget": ((2, 2), 1, MODELS["dropless"], {"dispatcher": {"kind": "all_to_all", "row_budget": 1.0}}, 1),
    "sharded": ((4, 2), 2, MODELS["bias_balanced, jitter, capacity"], {"data": "shard", "recompute": "block"}, 2),
}
"""Ranks and ep_size, copies on each rank, model, other options and micro-batches."""


@pytest.mark.one_in(2)
@pytest.mark.parametrize("case", PLACED)
def test_experts_learn_the_same_wherever_they_are(ranks: Ranks, tmp_path: Path, case: str) -> None:
    """Under a placement drawn for each layer, with copies."""
    (world_size, ep_size), num_copies, moe, parallel, num_pieces = PLACED[case]
    drawn, (plain,) = random.Random(case), contiguous_placement(1, 8, ep_size).owners
    owners = tuple(tuple(drawn.sample(plain, len(plain))) for _ in range(2))
    others = [[[e for e in range(8) if owner[e] != rank] for rank in range(ep_size)] for owner in owners]
    copies = tuple(tuple(tuple(drawn.sample(held, num_copies)) for held in layer) for layer in others)
    placement = ExpertPlacement(num_ranks=ep_size, owners=owners, copies=copies if num_copies else ())
    write_placement(tmp_path / "p.json", placement)
    where = {"ep_size": ep_size, "placement": str(tmp_path / "p.json"), "replicas": num_copies}
    together = _compare(ranks, (world_size, ep_size), moe, {**parallel, **where}, num_pieces=num_pieces)
    parts = [mine["state"].slices["model.blocks.1.ffn.experts.w_in"] for mine in together]
    expected = [[e for e in range(8) if owners[1][e] == rank % ep_size] for rank in range(world_size)]
    if "data" not in parallel:
        assert [[start + i for _, start, n in part.spans for i in range(n)] for part in parts] == expected


BUDGETS: dict[str, tuple[float, dict[str, Any], dict[str, Any], int]] = {
    "each step again": (1.0, MODELS["dropless"], {}, 2),
    "never again": (2.0, MODELS["dropless"], {}, 1),
    "recomputed": (1.0, MODELS["dropless"], {"recompute": "block"}, 2),
    "sharded": (1.0, MODELS["dropless"], {"data": "shard", "shard_keeps": "weights"}, 2),
    "never again, with drops and a selection bias": (1.0, MODELS["bias_balanced, jitter, capacity"], {}, 1),
    "null experts": (1.0, OTHER_ROUTERS["a bias over null experts"], {}, 1),
    "previous_step": (1.3, MODELS["previous_step"], {}, 2),
}
"""Row budget, model, other options and micro-batches."""


@pytest.mark.one_in(2)
@pytest.mark.parametrize("case", BUDGETS)
def test_a_row_budget_changes_nothing(ranks: Ranks, case: str) -> None:
    budget, moe, others, num_pieces = BUDGETS[case]
    parallel = {"dispatcher": {"kind": "all_to_all", "row_budget": budget}, **others}
    together = _compare(ranks, (4, 2), moe, parallel, num_pieces=num_pieces)
    (repeated,) = {mine["repeated"] for mine in together}
    assert (repeated == STEPS) if case == "each step again" else (repeated == 0) == case.startswith("never again")


@pytest.mark.parametrize("moe", [MODELS["dropless"], MODELS["previous_step"]], ids=["exact", "previous_step"])
def test_accumulation_over_ranks_learns_the_same(ranks: Ranks, moe: dict) -> None:
    _compare(ranks, (2, 2), moe, {}, num_pieces=2)


@pytest.mark.parametrize("data", ["replicate", "shard"])
def test_packed_documents_whose_answers_are_learned_are_the_same_on_any_ranks(ranks: Ranks, data: str) -> None:
    """With a document mask, and rows that end in padding."""
    moe = MODELS["bias_balanced, jitter, capacity"]
    _compare(ranks, (4, 2), moe, {"data": data}, num_pieces=2, is_packed=True)
