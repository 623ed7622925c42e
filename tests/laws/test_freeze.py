"""Law: frozen weights stay bit-equal and cost nothing, and the others learn as in a plain torch loop, in any layout."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.optim import AdamW
from torch.utils.flop_counter import FlopCounterMode

from tests.builders import make_batch, make_engine_of, make_model, rows_of, tiny_model_config
from tests.checkpoint_helpers import load, resume, save
from tests.ranks import Ranks, mesh_here
from trainer.checkpoint.compatible import check_fits
from trainer.distributed.mesh import Mesh
from trainer.engine.deepspeed.config import DeepSpeedEngineConfig
from trainer.engine.native import NativeEngine
from trainer.engine.registry import NativeEngineConfig
from trainer.engine.step import StepEngine
from trainer.errors import CheckpointError
from trainer.models.config import ModelConfig
from trainer.models.freeze import frozen_names
from trainer.models.parameter_roles import is_decayed
from trainer.parallel.config import ParallelConfig
from trainer.prove.gather import gather_state

STEPS, ROWS, SEQ_LEN, CLIP, RATE, DECAY = 3, 4, 8, 0.5, 1e-2, 0.1


class Rule(NamedTuple):
    """What learns and how fast: our sections, and the same as functions of a name."""

    freeze: list[str]
    lr_scale: dict[str, float]
    is_frozen: Callable[[str], bool]
    factor: Callable[[str], float]


RULES = [
    Rule(
        ["router", "embedding"],
        {"experts": 0.5, "blocks.0": 0.1},
        lambda name: ".router." in name or name == "embedding.weight",
        lambda name: (0.5 if ".experts." in name else 1.0) * (0.1 if name.startswith("blocks.0.") else 1.0),
    ),
    Rule(
        ["experts", "blocks.0.attention"],
        {"router": 0.005},
        lambda name: ".experts." in name or name.startswith("blocks.0.attention."),
        lambda name: 0.005 if ".router." in name else 1.0,
    ),
    Rule(
        ["*", "!experts"],
        {"*.w_out": 3.0},
        lambda name: ".experts." not in name,
        lambda name: 3.0 if name.endswith("w_out") else 1.0,
    ),
    Rule(["*", "!head"], {}, lambda name: name != "head.weight", lambda name: 1.0),
    Rule(
        ["norms", "*.w_in", "shared"],
        {"*.q*": 0.25, "attention": 2.0, "head": 1.5},
        lambda name: "norm" in name or name.endswith(".w_in") or ".shared." in name,
        lambda name: (
            (0.5 if ".qkv." in name else 2.0 if ".attention." in name else 1.0) * (1.5 if "head" in name else 1)
        ),
    ),
    Rule([], {"norms": 0.3, "embedding": 7.0}, lambda name: False, lambda name: _of_norms_and_embedding(name)),
]


def _of_norms_and_embedding(name: str) -> float:
    return 0.3 if "norm" in name else 7.0 if name == "embedding.weight" else 1.0


PLAIN = {"balance": {"coef": 0.0}, "z_loss_coef": 0.0}


class Where(NamedTuple):
    """A layout."""

    ep_size: int = 1
    data: str = "replicate"
    recompute: Any = "none"
    shard_size: int | None = None
    loss_chunk: int | None = None
    zero_stage: int | None = None


Case = tuple[Where, int, int]
"""Layout, number of experts and of the rule."""
LAYOUTS = {
    1: [Where(recompute="block"), Where(recompute="norms_and_activations", loss_chunk=5)],
    2: [Where(), Where(2), Where(1, "shard"), Where(2, "shard", "block", loss_chunk=3)],
    4: [Where(2, "shard", shard_size=2)],
}
NUM_CASES = {1: 2, 2: 8, 4: 2}


def _config(num_experts: int) -> ModelConfig:
    return tiny_model_config({"num_experts": num_experts, "num_shared_experts": 1, **PLAIN}, qk_norm=True)


def _pieces(mesh: Mesh, step: int) -> list[Any]:
    """Return this rank's rows of a step in two micro-batches, the same global batch whatever the layout."""
    whole = make_batch(ROWS * 2, SEQ_LEN, seed=step, first_sample=ROWS * 2 * step, ragged=True)
    share = len(whole.tokens) // mesh.layout.world_size
    mine = rows_of(whole, share * mesh.layout.rank, share * (mesh.layout.rank + 1))
    return [rows_of(mine, 0, 1), rows_of(mine, 1, share)]


def _engine(
    where: Where,
    num_experts: int,
    freeze: Sequence[str],
    lr_scale: Mapping[str, float] | None = None,
    dtype: torch.dtype = torch.float64,
) -> StepEngine:
    mesh = None
    if torch.distributed.is_initialized():
        mesh = mesh_here(ep_size=where.ep_size, shard_size=where.shard_size)
    layout = {key: getattr(where, key) for key in ("ep_size", "data", "shard_size", "recompute", "loss_chunk")}
    return make_engine_of(
        NativeEngineConfig() if where.zero_stage is None else DeepSpeedEngineConfig(zero_stage=where.zero_stage),
        _config(num_experts),
        dtype=dtype if where.zero_stage is None else torch.float32,
        seed=5,
        grad_clip=CLIP,
        mesh=mesh,
        parallel=ParallelConfig.model_validate(layout),
        freeze=freeze,
        lr_scale=lr_scale,
        weight_decay=DECAY,
    )


def _train(engine: StepEngine, first: int, last: int) -> list[float]:
    """Take steps first .. last - 1 and return the gradient norms."""
    rates = {step: RATE / (1 + step) for step in range(first, last)}
    return [engine.train_step(_pieces(engine.mesh, step), lr=lr).grad_norm for step, lr in rates.items()]


def _trained(where: Where, num_experts: int, rule: int) -> tuple[dict[str, Tensor], list[float]]:
    """Train some steps; return the whole state, on rank 0, and gradient norms."""
    with closing(_engine(where, num_experts, RULES[rule].freeze, RULES[rule].lr_scale)) as engine:
        norms = _train(engine, 0, STEPS)
        slices = gather_state(engine.state(), engine.mesh).slices
    assert all(p.grad is None for p in engine.parameters.values())
    return {name: part.tensor.clone() for name, part in slices.items()}, norms


def _by_torch(
    num_experts: int, are_frozen: Sequence[Callable[[str], bool]], factor: Callable[[str], float] = lambda name: 1.0
) -> tuple[Any, Any, list[float]]:
    """Train by torch alone, each step with its own frozen weights; return weights before and after, gradient norms.

    Each weight has an optimizer of its own, from its first step to the one before it is frozen.
    """
    model = make_model(_config(num_experts), dtype=torch.float64, seed=5)
    parameters, optimizers, norms = dict(model.named_parameters()), {}, []
    before = {name: p.detach().clone() for name, p in parameters.items()}
    for step, is_frozen in enumerate(are_frozen):
        learning = {name: p for name, p in parameters.items() if not is_frozen(name)}
        optimizers = {
            name: optimizers.get(name)
            or AdamW([p], betas=(0.9, 0.95), weight_decay=DECAY if is_decayed(name, p) else 0.0)
            for name, p in learning.items()
        }
        batch = make_batch(ROWS * 2, SEQ_LEN, seed=step, first_sample=ROWS * 2 * step, ragged=True)
        model.zero_grad()
        (model(batch).loss_sum / batch.target_mask.sum()).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(learning.values(), CLIP)))
        for name, optimizer in optimizers.items():
            optimizer.param_groups[0]["lr"] = RATE / (1 + step) * factor(name)
            optimizer.step()
    return before, {name: p.detach() for name, p in parameters.items()}, norms


@cache
def _expected(num_experts: int, rule: int) -> tuple[Any, Any, list[float]]:
    return _by_torch(num_experts, [RULES[rule].is_frozen] * STEPS, RULES[rule].factor)


def _same_norms(mine: Sequence[float], theirs: Sequence[float], rtol: float) -> None:
    torch.testing.assert_close(*(torch.tensor(n, dtype=torch.float64) for n in (mine, theirs)), rtol=rtol, atol=0)


def _check(found: Mapping[str, Tensor], norms: list[float], num_experts: int, rule: int, rtol: float) -> None:
    before, after, expected = _expected(num_experts, rule)
    _same_norms(norms, expected, rtol)
    for name, weight in after.items():
        mine, is_frozen = found[f"model.{name}"], RULES[rule].is_frozen(name)
        assert torch.equal(mine, before[name].to(mine.dtype)) is is_frozen, name
        assert float((mine - weight).abs().max()) <= rtol * max(1.0, float(weight.abs().max())), name
        assert (f"optim.exp_avg.{name}" in found) is not is_frozen, name


def _cases(wheres: Sequence[Where], num_cases: int = len(RULES)) -> list[Case]:
    """Return rules in layouts, each in the next one, by turns with experts that do not divide evenly."""
    return [
        (wheres[(turn // len(RULES) + turn) % len(wheres)], 3 + turn % 2, turn % len(RULES))
        for turn in range(num_cases)
    ]


def _trained_all(cases: Sequence[Case]) -> list[tuple[dict[str, Tensor], list[float]]]:
    return [_trained(*case) for case in cases]


def test_what_is_not_frozen_learns_as_by_torch_alone(ranks: Ranks) -> None:
    for world_size, wheres in LAYOUTS.items():
        cases = _cases(wheres, NUM_CASES[world_size])
        found = _trained_all(cases) if world_size == 1 else ranks.run(world_size, _trained_all, cases)[0]
        for (_, num_experts, rule), (state, norms) in zip(cases, found, strict=True):
            _check(state, norms, num_experts, rule, 1e-12)


def test_deepspeed_freezes_too(ranks: Ranks) -> None:
    pytest.importorskip("deepspeed")
    cases = _cases([Where(zero_stage=1), Where(2, zero_stage=2)])
    for (_, num_experts, rule), (state, norms) in zip(cases, ranks.run(2, _trained_all, cases)[0], strict=True):
        _check(state, norms, num_experts, rule, 2e-5)


def contains(name: str, word: str) -> bool:
    return word in name


def test_a_resumed_run_with_another_list_begins_moments_anew(tmp_path: Path) -> None:
    """A weight that learns again has no moments and no steps, as in a new optimizer; a frozen one loses them."""
    words = ["router", "router", "experts", "experts", "no word", "router"]
    freezes = [[word] if word != "no word" else [] for word in words]
    engine = _engine(Where(), 4, freezes[0])
    norms = _train(engine, 0, 2)
    for step in range(2, 6):
        save(tmp_path, step, engine.state())
        engine = _engine(Where(), 4, freezes[step])
        found = resume(engine, tmp_path, step)
        check_fits(found, engine.wanted())
        norms += _train(engine, step, step + 1)
    _, after, expected = _by_torch(4, [partial(contains, word=f".{word}.") for word in words])
    _same_norms(norms, expected, 1e-12)
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


@pytest.mark.nightly
def test_deepspeed_begins_moments_anew_for_a_whole_group_only(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    first = _engine(Where(zero_stage=1), 4, ["experts"])
    _train(first, 0, 2)
    save(tmp_path, 2, first.state())
    first.close()
    found: dict[int | None, dict[str, Tensor]] = {}
    for stage in (1, None):
        with closing(_engine(Where(zero_stage=stage), 4, ["*", "!experts"], dtype=torch.float32)) as engine:
            resume(engine, tmp_path, 2)
            assert engine.moments_since == dict.fromkeys(engine.learning, 2)
            _train(engine, 2, 4)
            found[stage] = {name: part.tensor.clone() for name, part in engine.state().slices.items()}
    torch.testing.assert_close(found[1], found[None], rtol=2e-5, atol=1e-6)
    with closing(_engine(Where(zero_stage=1), 4, [])) as engine:
        resume(engine, tmp_path, 2)  # experts are a group of their own
        assert sorted(set(engine.moments_since.values())) == [2]
    with closing(_engine(Where(zero_stage=1), 4, ["router"])) as engine:
        _train(engine, 0, 2)
        save(tmp_path, 3, engine.state())
    with (
        closing(_engine(Where(zero_stage=1), 4, [])) as engine,
        pytest.raises(CheckpointError, match=r"router.* has moments since step 2 .*DeepSpeed has one step count"),
    ):
        resume(engine, tmp_path, 3)


def test_a_selection_bias_stops_with_its_router() -> None:
    config = tiny_model_config({"router": {"kind": "bias_balanced", "bias_update_rate": 0.05}})
    for freeze, moves in (([], True), (["experts"], True), (["router"], False)):
        engine = make_engine_of(NativeEngineConfig(), config, freeze=freeze)
        engine.train_step([make_batch(4, 8)], lr=1e-2)
        assert bool(engine.model.moe_layers()[0].router.get_buffer("bias").any()) is moves, freeze


def _backward_flops(freeze: Sequence[str]) -> int:
    engine = _engine(Where(loss_chunk=5), 4, freeze)
    with FlopCounterMode(display=False) as counter:
        engine.accumulate([make_batch(2, SEQ_LEN)])
    return counter.get_total_flops()


@pytest.mark.parametrize("role", ["experts", "router", "attention", "shared", "head"])
def test_a_frozen_weight_costs_no_gradient(role: str) -> None:
    """The product that gives it is not made, and costs as much as the weight's product forward."""
    tokens, model = 2 * SEQ_LEN, _engine(Where(), 4, []).model
    frozen = {name: model.get_parameter(name) for name in frozen_names(model, [role])}
    share = 2 / 4 if role == "experts" else 1.0  # two of four experts for each token
    products = sum(2 * tokens * int(p.numel() * share) for p in frozen.values() if p.dim() > 1)
    assert _backward_flops([]) - _backward_flops([role]) == products > 0


def test_a_frozen_weight_costs_no_memory_beside_itself() -> None:
    engine = _engine(Where(), 4, ["experts", "embedding"])
    assert isinstance(engine, NativeEngine)
    engine.accumulate([make_batch(2, SEQ_LEN)])
    learning = sum(p.numel() for p in engine.learning.values())
    assert sum(p.grad.numel() for p in engine.parameters.values() if p.grad is not None) == learning
    reduced = [p for reducer in engine.gradient_reducers for p in reducer.parameters]
    assert sum(p.numel() for p in reduced) == learning
    _train(engine, 0, 1)
    moments = [t for state in engine.optimizer.state.values() for t in state.values() if t.dim()]
    assert sum(t.numel() for t in moments) == 2 * learning < 2 * sum(p.numel() for p in engine.parameters.values())
