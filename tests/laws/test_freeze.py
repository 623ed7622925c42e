"""Law: frozen weights stay bit-equal and cost nothing, and the others learn as in a plain torch loop, in any layout."""

import itertools
from collections.abc import Mapping, Sequence
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.optim import AdamW

from tests.builders import make_batch, make_engine_of, make_model, rows_of, tiny_model_config
from tests.checkpoint_helpers import load, resume, save
from tests.ranks import Ranks, mesh_here
from trainer.checkpoint.compatible import check_fits
from trainer.distributed.mesh import Mesh
from trainer.engine.deepspeed.config import DeepSpeedEngineConfig
from trainer.engine.registry import NativeEngineConfig
from trainer.engine.step import StepEngine
from trainer.models.config import ModelConfig
from trainer.models.parameter_patterns import selected
from trainer.models.parameter_roles import is_decayed
from trainer.parallel.config import ParallelConfig
from trainer.prove.gather import gather_state

STEPS, ROWS, SEQ_LEN, CLIP, RATE, DECAY = 3, 4, 8, 0.5, 1e-2, 0.1
LISTS = {
    "router and embedding": ["router", "embedding"],
    "experts and a layer": ["experts", "blocks.0.attention"],
    "all but experts": ["*", "!experts"],
    "all but the head": ["*", "!head"],
    "norms, half of the experts' weights": ["norms", "*.w_in", "shared"],
}
PLAIN = {"balance": {"coef": 0.0}, "z_loss_coef": 0.0}


class Where(NamedTuple):
    """A layout."""

    ep_size: int = 1
    data: str = "replicate"
    recompute: Any = "none"
    shard_size: int | None = None
    loss_chunk: int | None = None
    zero_stage: int | None = None


Case = tuple[Where, int, list[str]]
"""Layout, number of experts and list."""
LAYOUTS = {
    1: [Where(recompute="block"), Where(recompute="norms_and_activations", loss_chunk=5)],
    2: [Where(), Where(2), Where(1, "shard"), Where(2, "shard", "block", loss_chunk=3)],
    4: [Where(2, "shard", shard_size=2)],
}
NUM_CASES = {1: 4, 2: 10, 4: 2}


def _config(num_experts: int) -> ModelConfig:
    return tiny_model_config({"num_experts": num_experts, "num_shared_experts": 1, **PLAIN}, qk_norm=True)


def _pieces(mesh: Mesh, step: int) -> list[Any]:
    """Return this rank's rows of a step in two micro-batches, the same global batch whatever the layout."""
    whole = make_batch(ROWS * 2, SEQ_LEN, seed=step, first_sample=ROWS * 2 * step, ragged=True)
    share = len(whole.tokens) // mesh.layout.world_size
    mine = rows_of(whole, share * mesh.layout.rank, share * (mesh.layout.rank + 1))
    return [rows_of(mine, 0, 1), rows_of(mine, 1, share)]


def _engine(where: Where, num_experts: int, freeze: Sequence[str]) -> StepEngine:
    mesh = None
    if torch.distributed.is_initialized():
        mesh = mesh_here(ep_size=where.ep_size, shard_size=where.shard_size)
    layout = {key: getattr(where, key) for key in ("ep_size", "data", "shard_size", "recompute", "loss_chunk")}
    return make_engine_of(
        NativeEngineConfig() if where.zero_stage is None else DeepSpeedEngineConfig(zero_stage=where.zero_stage),
        _config(num_experts),
        dtype=torch.float64 if where.zero_stage is None else torch.float32,
        seed=5,
        grad_clip=CLIP,
        mesh=mesh,
        parallel=ParallelConfig.model_validate(layout),
        freeze=freeze,
        weight_decay=DECAY,
    )


def _train(engine: StepEngine, first: int, last: int) -> list[float]:
    """Take steps first .. last - 1 and return the gradient norms."""
    rates = {step: RATE / (1 + step) for step in range(first, last)}
    return [engine.train_step(_pieces(engine.mesh, step), lr=lr).grad_norm for step, lr in rates.items()]


def _trained(where: Where, num_experts: int, freeze: list[str]) -> tuple[dict[str, Tensor], list[float]]:
    """Train some steps; return the whole state, on rank 0, and gradient norms."""
    with closing(_engine(where, num_experts, freeze)) as engine:
        norms = _train(engine, 0, STEPS)
        slices = gather_state(engine.state(), engine.mesh).slices
    assert all(p.grad is None for p in engine.parameters.values())
    return {name: part.tensor.clone() for name, part in slices.items()}, norms


def _by_torch(num_experts: int, freezes: Sequence[Sequence[str]]) -> tuple[Any, Any, list[float]]:
    """Train by torch alone, each step with its own list; return weights before and after, and gradient norms.

    Each weight has an optimizer of its own, from its first step to the one before it is frozen.
    """
    model = make_model(_config(num_experts), dtype=torch.float64, seed=5)
    parameters, optimizers, norms = dict(model.named_parameters()), {}, []
    before = {name: p.detach().clone() for name, p in parameters.items()}
    for step, freeze in enumerate(freezes):
        learning = {name: p for name, p in parameters.items() if not selected(freeze, name)}
        optimizers = {
            name: optimizers.get(name)
            or AdamW([p], betas=(0.9, 0.95), weight_decay=DECAY if is_decayed(name, p) else 0.0)
            for name, p in learning.items()
        }
        batch = make_batch(ROWS * 2, SEQ_LEN, seed=step, first_sample=ROWS * 2 * step, ragged=True)
        model.zero_grad()
        (model(batch).loss_sum / batch.target_mask.sum()).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(learning.values(), CLIP)))
        for optimizer in optimizers.values():
            optimizer.param_groups[0]["lr"] = RATE / (1 + step)
            optimizer.step()
    return before, {name: p.detach() for name, p in parameters.items()}, norms


@cache
def _expected(num_experts: int, freeze: tuple[str, ...]) -> tuple[Any, Any, list[float]]:
    return _by_torch(num_experts, [freeze] * STEPS)


def _check(found: Mapping[str, Tensor], norms: list[float], num_experts: int, freeze: list[str], rtol: float) -> None:
    before, after, expected = _expected(num_experts, tuple(freeze))
    torch.testing.assert_close(torch.tensor(norms), torch.tensor(expected), rtol=rtol, atol=0)
    for name, weight in after.items():
        mine = found[f"model.{name}"]
        if selected(freeze, name):
            assert torch.equal(mine, before[name].to(mine.dtype)), name
        else:
            assert not torch.equal(mine, before[name].to(mine.dtype)), name
            assert float((mine - weight).abs().max()) <= rtol * max(1.0, float(weight.abs().max())), name
        assert (f"optim.exp_avg.{name}" in found) is not selected(freeze, name), name


def _cases(wheres: Sequence[Where], num_lists: int = len(LISTS)) -> list[Case]:
    """Return lists in layouts, each in the next one, by turns with experts that do not divide evenly."""
    return [
        (wheres[(turn // len(LISTS) + turn) % len(wheres)], 3 + turn % 2, freeze)
        for turn, freeze in enumerate(itertools.islice(itertools.cycle(LISTS.values()), num_lists))
    ]


def _trained_all(cases: Sequence[Case]) -> list[tuple[dict[str, Tensor], list[float]]]:
    return [_trained(*case) for case in cases]


def test_what_is_not_frozen_learns_as_by_torch_alone(ranks: Ranks) -> None:
    for world_size, wheres in LAYOUTS.items():
        cases = _cases(wheres, NUM_CASES[world_size])
        found = _trained_all(cases) if world_size == 1 else ranks.run(world_size, _trained_all, cases)[0]
        for (_, num_experts, freeze), (state, norms) in zip(cases, found, strict=True):
            _check(state, norms, num_experts, freeze, 1e-12)


def test_deepspeed_freezes_too(ranks: Ranks) -> None:
    pytest.importorskip("deepspeed")
    cases = _cases([Where(zero_stage=1), Where(2, zero_stage=2)])
    for (_, num_experts, freeze), (state, norms) in zip(cases, ranks.run(2, _trained_all, cases)[0], strict=True):
        _check(state, norms, num_experts, freeze, 2e-4)


def test_a_resumed_run_with_another_list_begins_moments_anew(tmp_path: Path) -> None:
    """A weight that learns again has no moments and no steps, as in a new optimizer; a frozen one loses them."""
    freezes = [["router"], ["router"], ["experts"], ["experts"], [], ["router"]]
    engine = _engine(Where(), 4, freezes[0])
    norms = _train(engine, 0, 2)
    for step in range(2, 6):
        save(tmp_path, step, engine.state())
        engine = _engine(Where(), 4, freezes[step])
        found = resume(engine, tmp_path, step)
        check_fits(found, engine.wanted())
        norms += _train(engine, step, step + 1)
    _, after, expected = _by_torch(4, freezes)
    torch.testing.assert_close(torch.tensor(norms), torch.tensor(expected), rtol=1e-12, atol=0)
    for name, weight in after.items():
        torch.testing.assert_close(engine.parameters[name].detach(), weight, rtol=0, atol=1e-12, msg=name)
    assert engine.moments_since == {name: 4 for name in engine.learning if "experts" in name}
    saved = load(tmp_path, 5)
    assert not any(name.startswith("optim.") and "router" in name for name in engine.state().slices)
    assert any(name.startswith("optim.") and "router" in name for name in saved)


def test_a_resumed_run_with_the_same_list_continues_bit_for_bit(tmp_path: Path) -> None:
    """Also where moments began later than the run."""
    engine = _engine(Where(), 4, ["router"])
    _train(engine, 0, 2)
    save(tmp_path, 2, engine.state())
    whole, first_half = _engine(Where(), 4, []), _engine(Where(), 4, [])
    for one in (whole, first_half):
        resume(one, tmp_path, 2)
    norms = _train(whole, 2, 6)
    assert _train(first_half, 2, 4) == norms[:2]
    save(tmp_path, 4, first_half.state())
    second_half = _engine(Where(), 4, [])
    resume(second_half, tmp_path, 4)
    assert _train(second_half, 4, 6) == norms[2:]
    ours, theirs = second_half.state(), whole.state()
    assert ours.values == theirs.values and ours.values["moments_since.blocks.0.ffn.router.gate.weight"] == 2
    assert all(torch.equal(part.tensor, theirs.slices[name].tensor) for name, part in ours.slices.items())


def test_a_selection_bias_stops_with_its_router() -> None:
    config = tiny_model_config({"router": {"kind": "bias_balanced", "bias_update_rate": 0.05}})
    for freeze, moves in (([], True), (["experts"], True), (["router"], False)):
        engine = make_engine_of(NativeEngineConfig(), config, freeze=freeze)
        engine.train_step([make_batch(4, 8)], lr=1e-2)
        assert bool(engine.model.moe_layers()[0].router.get_buffer("bias").any()) is moves, freeze
