"""Law: adapters learn as the factors of W + s B A do by torch alone, in any layout, and the base keeps its bits."""

from collections.abc import Mapping, Sequence
from contextlib import closing
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from torch.optim import AdamW

from tests.builders import make_batch, make_engine_of, make_model, rows_of, tiny_model_config
from tests.ranks import Ranks, mesh_here
from trainer.engine.deepspeed.config import DeepSpeedEngineConfig
from trainer.engine.registry import NativeEngineConfig
from trainer.engine.step import StepEngine
from trainer.models.config import ModelConfig
from trainer.models.gpt import GPT
from trainer.models.parameter_roles import factor_names, is_adapter, is_decayed
from trainer.parallel.config import ParallelConfig
from trainer.prove.gather import gather_state

STEPS, ROWS, SEQ_LEN, CLIP, RATE, DECAY = 3, 4, 8, 0.5, 5e-2, 0.1
LORAS: dict[str, dict[str, Any]] = {
    "everything": {"rank": 3, "alpha": 3.0},
    "experts and routers": {"rank": 4, "targets": ["experts"], "trains": ["router"], "use_rslora": True},
    "attention": {"rank": 3, "targets": ["attention.qkv", "shared"]},
}
PLAIN = {"balance": {"coef": 0.0}, "z_loss_coef": 0.0}


class Where(NamedTuple):
    """A layout."""

    ep_size: int = 1
    data: str = "replicate"
    recompute: Any = "none"
    kernel: str = "loop"
    dispatcher: dict[str, Any] | None = None
    shard_size: int | None = None
    zero_stage: int | None = None
    dtype: torch.dtype = torch.float64


Case = tuple[Where, int, str]
"""Layout, number of experts and name of the adapters."""
CHUNKS = {"kind": "all_to_all", "chunks": 2}
CASES: dict[int, list[Case]] = {
    1: [(Where(recompute="block", kernel="fused"), 4, "everything"), (Where(), 4, "attention")],
    2: [
        (Where(2, kernel="padded"), 3, "everything"),
        (Where(2, dispatcher=CHUNKS, recompute="experts"), 4, "everything"),
        (Where(2, "shard", "block"), 3, "everything"),
        (Where(1, "shard", kernel="fused"), 4, "experts and routers"),
        (Where(1, "shard"), 4, "attention"),
        (Where(2, dispatcher={"kind": "all_gather"}), 3, "experts and routers"),
        (Where(), 3, "attention"),
        (Where(2, zero_stage=1, dtype=torch.float32), 3, "everything"),
        (Where(1, zero_stage=2, dtype=torch.float32), 4, "experts and routers"),
    ],
    4: [
        (Where(2, "shard", shard_size=2), 3, "everything"),
        (Where(1, "shard", kernel="fused"), 3, "everything"),
    ],
}


def _config(num_experts: int, name: str) -> ModelConfig:
    moe = {"num_experts": num_experts, "num_shared_experts": 1, "expert_bias": True, **PLAIN}
    return tiny_model_config(moe, qk_norm=True, lora=LORAS[name])


def _pieces(rank: int, world_size: int, step: int) -> list[Any]:
    """Return a rank's rows of a step in two micro-batches, the same global batch whatever the layout."""
    whole = make_batch(ROWS * 2, SEQ_LEN, seed=step, first_sample=ROWS * 2 * step, ragged=True)
    share = len(whole.tokens) // world_size
    mine = rows_of(whole, share * rank, share * (rank + 1))
    return [rows_of(mine, 0, 1), rows_of(mine, 1, share)]


def _engine(where: Where, num_experts: int, name: str) -> StepEngine:
    mesh = None
    if torch.distributed.is_initialized():
        mesh = mesh_here(ep_size=where.ep_size, shard_size=where.shard_size)
    layout = {key: getattr(where, key) for key in ("ep_size", "data", "shard_size", "recompute")}
    layout |= {} if where.dispatcher is None else {"dispatcher": where.dispatcher}
    return make_engine_of(
        NativeEngineConfig() if where.zero_stage is None else DeepSpeedEngineConfig(zero_stage=where.zero_stage),
        _config(num_experts, name),
        dtype=where.dtype,
        seed=5,
        kernel=where.kernel,
        grad_clip=CLIP,
        mesh=mesh,
        parallel=ParallelConfig.model_validate(layout),
        weight_decay=DECAY,
    )


def _trained(where: Where, num_experts: int, name: str) -> tuple[dict[str, Tensor], list[float]]:
    """Train some steps; return the whole state, on rank 0, and gradient norms."""
    if where.zero_stage is not None:
        pytest.importorskip("deepspeed")
    with closing(_engine(where, num_experts, name)) as engine:
        layout = engine.mesh.layout
        norms = [
            engine.train_step(_pieces(layout.rank, layout.world_size, step), lr=RATE / (1 + step)).grad_norm
            for step in range(STEPS)
        ]
        slices = gather_state(engine.state(), engine.mesh).slices
    return {name: part.tensor.clone() for name, part in slices.items()}, norms


def composed(parameters: Mapping[str, Tensor], plain: GPT, scale: float) -> dict[str, Tensor]:
    """Return the parameters of the model without adapters: W, or W + s B A."""
    found = {}
    for name in dict(plain.named_parameters()):
        a, b = factor_names(name)
        weight = parameters[name]
        found[name] = weight + scale * parameters[b] @ parameters[a] if a in parameters else weight
    return found


@cache
def _expected(num_experts: int, name: str) -> tuple[dict[str, Tensor], dict[str, Tensor], list[float]]:
    """Train by torch alone; return weights before and after, and gradient norms."""
    config = _config(num_experts, name)
    assert config.lora is not None
    model, plain = (make_model(c, dtype=torch.float64, seed=5) for c in (config, config.merged))
    parameters = dict(model.named_parameters())
    before = {key: p.detach().clone() for key, p in parameters.items()}
    learning = {key: p for key, p in parameters.items() if p.requires_grad}
    groups = [{"params": [p], "weight_decay": DECAY if is_decayed(key, p) else 0.0} for key, p in learning.items()]
    optimizer, norms = AdamW(groups, betas=(0.9, 0.95)), []
    for step in range(STEPS):
        batch = make_batch(ROWS * 2, SEQ_LEN, seed=step, first_sample=ROWS * 2 * step, ragged=True)
        optimizer.zero_grad()
        loss = functional_call(plain, composed(parameters, plain, config.lora.scale), (batch,)).loss_sum
        (loss / batch.target_mask.sum()).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(learning.values(), CLIP)))
        for group in optimizer.param_groups:
            group["lr"] = RATE / (1 + step)
        optimizer.step()
    return before, {key: p.detach() for key, p in parameters.items()}, norms


def _trained_all(cases: Sequence[Case]) -> list[tuple[dict[str, Tensor], list[float]]]:
    return [_trained(*case) for case in cases]


@pytest.mark.one_in(2)
@pytest.mark.parametrize("world_size", CASES)
def test_adapters_learn_as_the_factors_of_a_sum_by_torch_alone(ranks: Ranks, world_size: int) -> None:
    cases = CASES[world_size]
    found = _trained_all(cases) if world_size == 1 else ranks.run(world_size, _trained_all, cases)[0]
    for (where, num_experts, name), (state, norms) in zip(cases, found, strict=True):
        before, after, expected = _expected(num_experts, name)
        rtol = 1e-12 if where.dtype is torch.float64 else 1e-3
        torch.testing.assert_close(torch.tensor(norms), torch.tensor(expected), rtol=rtol, atol=0)
        for key, weight in after.items():
            mine = state[f"model.{key}"]
            learns = is_adapter(key) or (".router." in key and "trains" in LORAS[name])
            assert torch.equal(mine, before[key].to(mine.dtype)) is not learns, key
            assert float((mine - weight).abs().max()) <= rtol * max(1.0, float(weight.abs().max())), (where, key)
            assert (f"optim.exp_avg.{key}" in state) is learns, key
