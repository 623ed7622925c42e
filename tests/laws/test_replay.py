"""Law: replaying the experts of a run gives the same bits as the run, and other experts the gradients of their choice.

The choices are those of one process; every layout that replays them equals the same layout choosing for itself.
"""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.builders import make_batch, make_engine, make_engine_of, rows_of, tiny_model_config
from tests.ranks import Ranks, mesh_here
from trainer.data.batches.assemble import pad_rows
from trainer.data.batches.batch import Batch
from trainer.distributed.mesh import Mesh
from trainer.distributed.rank_layout import even_slice
from trainer.engine.deepspeed.config import DeepSpeedEngineConfig
from trainer.engine.step import StepEngine
from trainer.parallel.config import ParallelConfig
from trainer.prove.gather import gather_state

ROWS, SEQ_LEN, STEPS = 7, 8, 3
MODELS: dict[str, dict[str, Any]] = {
    "a bias, noise, drops, a global balance": {
        "num_experts": 5,
        "router": {"kind": "bias_balanced", "jitter": 0.3, "bias_update_rate": 0.05},
        "capacity": {"factor": 0.8, "min": 1, "policy": "choice_major", "renormalize_after_drop": True},
        "balance": {"coef": 0.1, "scope": "global_batch", "counts": "exact"},
    },
    "null experts, importance": {
        "num_experts": 5,
        "router": {"kind": "top_k", "top_k": 3, "null_experts": 2, "scale": 2.0},
        "balance": {"coef": 0.1, "counts": "previous_step"},
        "cv_squared": {"importance_coef": 0.1},
    },
}
ONE_RANK_MORE: dict[str, dict[str, Any]] = {
    "groups": {"num_experts": 6, "router": {"kind": "group_limited", "groups": 3, "groups_kept": 2, "top_k": 3}},
    "a load": {"router": {"kind": "noisy_top_k"}, "cv_squared": {"load_coef": 0.1}},
    "a random second": {"router": {"kind": "gshard", "normalize": False}},
    "one raw score": {"router": {"kind": "switch"}},
    "cosines": {"router": {"kind": "cosine", "d_proj": 6}},
    "dense layers between and after": {"layers": [1, 3]},
    "a plan of the sequence": {"router": {"kind": "sinkhorn"}},
}
LAYOUTS: list[tuple[int, dict[str, Any], int]] = [
    (2, {"ep_size": 2, "recompute": "block"}, 1),  # 5 experts: uneven
    (2, {"data": "shard"}, 2),
    (3, {"ep_size": 3, "dispatcher": {"kind": "deduplicated_all_to_all"}}, 2),
]


def _batch(step: int) -> Batch:
    return make_batch(ROWS, SEQ_LEN, seed=step, first_sample=ROWS * step, ragged=step == 1, repeats=step == 2)


def _train(engine: StepEngine, choices: list[Tensor] | None, num_pieces: int) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Return losses, statistics and the whole state after some steps, and the experts of each step's rows."""
    layout, found, taken = engine.mesh.layout, [], []
    for step in range(STEPS):
        whole = _batch(step)
        if choices is not None:
            whole = replace(whole, experts=choices[step])
        mine = rows_of(whole, *even_slice(ROWS, layout.world_size, layout.rank))
        size = math.ceil(math.ceil(ROWS / layout.world_size) / num_pieces)
        mine = pad_rows(mine, size * num_pieces)
        pieces = [rows_of(mine, i * size, (i + 1) * size) for i in range(num_pieces)]
        result = engine.train_step(pieces, lr=1e-2, return_experts=True)
        routing = result.routing
        assert routing is not None
        if choices is not None:
            assert routing.replaced is not None and routing.missed_mass is not None
            assert not routing.replaced.any() and not routing.missed_mass.any(), "the live router chooses the same"
        taken.append(torch.cat(list(result.experts)))
        further = [result.balance_loss or 0.0, result.z_loss or 0.0, *result.extra_losses.values()]
        found.append(torch.tensor([result.loss, result.grad_norm, *further, *routing.dropped.tolist()]).double())
    state = gather_state(engine.state(), engine.mesh).slices
    return {"curve": torch.stack(found), **{name: part.tensor.clone() for name, part in state.items()}}, taken


def _engine(moe: dict[str, Any], mesh: Mesh | None = None, **parallel: Any) -> StepEngine:
    section = ParallelConfig.model_validate(parallel)
    sizes = {"num_layers": 5} if "layers" in moe else {}
    return make_engine(
        tiny_model_config(moe, **sizes), dtype=torch.float64, kernel="fused", mesh=mesh, parallel=section
    )


def _same_bits(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    for name, tensor in theirs.items():
        assert torch.equal(mine[name], tensor), name


@pytest.mark.one_in(2)
@pytest.mark.parametrize("moe", {**MODELS, **ONE_RANK_MORE}.values(), ids={**MODELS, **ONE_RANK_MORE}.keys())
def test_a_replayed_run_has_the_bits_of_the_run(moe: dict[str, Any]) -> None:
    """The choices of one micro-batch, replayed in one, in pieces, and under recomputation."""
    own, choices = _train(_engine(moe), None, 1)
    again, taken = _train(_engine(moe), choices, 1)
    _same_bits(again, own)
    assert all(torch.equal(a, b) for a, b in zip(taken, choices, strict=True))
    in_pieces = _train(_engine(moe, recompute="block"), None, 3)[0]
    _same_bits(_train(_engine(moe, recompute="block"), choices, 3)[0], in_pieces)


def _on_ranks(moe: dict[str, Any], parallel: dict[str, Any], pieces: int, choices: list[Tensor]) -> list[Any]:
    degrees = {key: parallel[key] for key in ("ep_size", "shard_size") if key in parallel}
    return [_train(_engine(moe, mesh_here(**degrees), **parallel), given, pieces)[0] for given in (None, choices)]


@pytest.mark.parametrize("moe", MODELS.values(), ids=MODELS.keys())
def test_a_replayed_run_has_the_bits_of_the_run_on_ranks(ranks: Ranks, moe: dict[str, Any]) -> None:
    choices = _train(_engine(moe), None, 1)[1]
    for world_size, parallel, pieces in LAYOUTS:
        for own, replayed in ranks.run(world_size, _on_ranks, moe, parallel, pieces, choices):
            _same_bits(replayed, own)


def test_a_replayed_run_has_the_bits_of_the_run_under_deepspeed() -> None:
    pytest.importorskip("deepspeed")
    moe, found = MODELS["null experts, importance"], []
    choices: list[Tensor] | None = None
    for _ in range(2):
        engine = make_engine_of(DeepSpeedEngineConfig(zero_stage=1), tiny_model_config(moe), kernel="fused")
        result, choices = _train(engine, choices, 2)
        found.append(result)
        choices = [rows[:ROWS] for rows in choices]
        engine.close()
    _same_bits(found[1], found[0])


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_other_experts_have_the_gradients_of_a_router_that_chooses_them(score: str) -> None:
    """A selection bias makes a router choose these experts by itself; the weights never see the bias."""
    moe = {"num_experts": 4, "router": {"kind": "bias_balanced", "score": score, "bias_update_rate": 0.0, "scale": 1.5}}
    batch = make_batch(3, SEQ_LEN, ragged=True)
    pushed, given = _engine(moe), _engine(moe)
    for layer in pushed.model.moe_layers():
        layer.router.get_buffer("bias").copy_(torch.tensor([0.0, 5.0, 0.0, 9.0]))
    own = pushed.accumulate([batch], return_experts=True)
    assert (own.experts[0] == torch.tensor([3, 1])).all()
    replayed = given.accumulate([replace(batch, experts=own.experts[0].to(torch.uint8))])
    gradients = given.gradients().slices
    for name, part in pushed.gradients().slices.items():
        torch.testing.assert_close(gradients[name].tensor, part.tensor, rtol=0, atol=1e-12)
    routing = replayed.routing
    assert routing is not None and routing.replaced is not None and routing.replaced_somewhere is not None
    assert torch.equal(routing.counts, torch.tensor([0, 1, 0, 1]) * routing.tokens[:, None])
    assert 0 < int(routing.replaced_somewhere) <= int(routing.tokens[0])
    assert any(gradients[f"blocks.{layer}.ffn.router.gate.weight"].tensor.any() for layer in (0, 1))


def test_what_the_live_router_would_have_chosen_is_counted_by_hand() -> None:
    """All tokens are given experts 0 and 1: the measures follow from the scores alone."""
    engine = _engine({"num_experts": 3})
    batch = make_batch(2, SEQ_LEN)
    given = torch.tensor([0, 1], dtype=torch.uint8).expand(2, SEQ_LEN, 2, 2).contiguous()
    routing = engine.accumulate([replace(batch, experts=given)]).routing
    assert routing is not None and routing.replaced_tokens is not None
    router = engine.model.moe_layers()[0].router
    seen: list[Tensor] = []
    hook = router.register_forward_hook(lambda _, __, output: seen.append(output.scores))
    engine.accumulate([replace(batch, experts=given)])
    hook.remove()
    best = seen[0].argsort(dim=-1, descending=True)
    wants_third = (best[:, :2] == 2).any(-1)
    missed = (seen[0].sort(descending=True).values[:, :2].sum(-1) - seen[0][:, :2].sum(-1)).sum()
    assert routing.replaced is not None and routing.missed_mass is not None
    assert int(routing.replaced_tokens[0]) == int(wants_third.sum()) == int(routing.replaced[0]) > 0
    torch.testing.assert_close(routing.missed_mass[0], missed, rtol=0, atol=1e-12)
