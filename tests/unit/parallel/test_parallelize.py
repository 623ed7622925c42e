"""What a rank of a large world holds, and needs to start."""

import json
from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist

from tests import imported_once
from tests.builders import make_model, tiny_model_config
from tests.fake_world import fake_mesh
from tests.launched_ranks import ROOT
from trainer.config.loader import load
from trainer.distributed.collectives import Group
from trainer.distributed.mesh import Mesh
from trainer.distributed.rank_layout import Layout
from trainer.errors import ConfigError
from trainer.experiment import ExperimentConfig
from trainer.models.block import Block
from trainer.models.gpt import GPT
from trainer.ops import block_attention
from trainer.ops.attention import blocked_attention, torch_attention
from trainer.ops.block_attention import flex
from trainer.parallel.parallelize import choose_attention, parallelize, share_rows
from trainer.parallel.shards import local


def _held(layout: dict[str, Any], model: dict[str, Any], *device: str) -> dict[str, int]:
    command = ["-m", "tests.fake_world", json.dumps(layout), json.dumps(model), *device]
    done = imported_once.run(command, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("rank", [0, 200, 511])
def test_every_rank_of_512_holds_its_fair_share_although_there_are_fewer_experts(rank: int) -> None:
    """16 experts on 64 ranks: by whole experts, the first 16 ranks would hold one and the others none."""
    model = {"num_layers": 2, "num_experts": 128, "d_ff": 64, "d_model": 256, "num_heads": 8, "num_kv_heads": 8}
    mine = _held({"world_size": 512, "ep_size": 8, "rank": rank}, model)
    assert mine["experts"] == 2 * 128 * 3 * 256 * 64 // 512
    dense = 2 * 32000 * 256 + 2 * (4 * 256 * 256 + 128 * 256 + 2 * 256) + 256
    one_row_of_each = 2 * 256 + 2 * (2 * 256 + 256 + 2) + 1
    assert mine["dense"] <= dense / 512 + one_row_of_each


def test_groups_of_64_hold_8_times_as_much() -> None:
    model = {"num_layers": 2, "num_experts": 128, "d_ff": 64, "d_model": 256, "num_heads": 8, "num_kv_heads": 8}
    mine = _held({"world_size": 512, "ep_size": 8, "shard_size": 64}, model)
    assert mine["experts"] == 2 * 128 * 3 * 256 * 64 // 64


def test_no_tensor_is_whole_while_a_rank_starts() -> None:
    """At the peak there are its shards and some drawn numbers: here 43 and 1 MB; the embedding has 33, all 573."""
    model = {"num_layers": 16, "num_experts": 16, "d_ff": 768, "d_model": 256, "num_heads": 8, "num_kv_heads": 8}
    mine = _held({"world_size": 16}, model, "cpu")
    whole = 4 * (2 * 32000 * 256 + 16 * (4 * 256 * 256 + 16 * 3 * 256 * 768 + 16 * 256))
    assert whole > 570e6 and mine["peak_bytes"] < 4 * (mine["dense"] + mine["experts"]) + 4 * 32000 * 256 / 2


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    ("path", "world_size", "billions", "share"),
    [
        ("planning/kimi_k2_1t_a32b", 1024, 1026, 1.0),
        ("moe_30b_a3b", 512, 30.5, 1.0),
        ("moe_235b_a22b", 512, 235.1, 1.058),  # the first of 16 stages has 6 of 94 layers, and the embedding
    ],
)
def test_a_rank_of_many_starts_a_large_model_without_its_values(
    path: str, world_size: int, billions: float, share: float
) -> None:
    """It holds its share, on the meta device; that takes 5 s of one core for a trillion weights, and 420 MB."""
    config = load(str(ROOT / f"configs/{path}.yaml"), [], ExperimentConfig)
    with torch.device("meta"):
        model = GPT(config.model, config.model.vocab_size or 0)
    total = sum(p.numel() for p in model.parameters())
    assert total / 1e9 == pytest.approx(billions, rel=2e-3)
    try:
        mesh = fake_mesh(Layout(world_size=world_size, rank=5, ranks_per_node=8, **asdict(config.parallel.degrees)))
        on, dtype = torch.device("meta"), torch.bfloat16
        parallelize(model, config.parallel, mesh, on, seed=None, dtype=dtype, can_compile=False)
    finally:
        dist.destroy_process_group()
    assert sum(local(p).numel() for p in model.parameters()) == pytest.approx(share * total / world_size, rel=0.02)
    assert all(local(p).is_meta for p in model.parameters())


@pytest.mark.parametrize(
    ("device", "document_mask", "is_compiled", "expected"),
    [
        ("cuda", True, False, (flex, "blocks")),
        ("cuda", False, True, (torch_attention, "dense")),
        ("cpu", True, False, (torch_attention, "dense")),
        ("cpu", True, True, (blocked_attention, "dense")),
    ],
)
def test_documents_are_kept_apart_by_a_kernel_that_stores_no_scores(
    device: str, document_mask: bool, is_compiled: bool, expected: tuple[Any, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_attention, "find_spec", lambda _: "installed")
    model = make_model(tiny_model_config(document_mask=document_mask, d_model=64, num_heads=4))
    choose_attention(model, torch.device(device), torch.bfloat16, is_compiled=is_compiled)
    kernels = {block.attention.core_attention for block in model.blocks if isinstance(block, Block)}
    assert (kernels, model.mask_form) == ({expected[0]}, expected[1])


def test_a_router_that_looks_ahead_and_does_not_see_whole_rows_is_refused() -> None:
    model = make_model(tiny_model_config())
    share_rows(model, replace(Mesh.of_one(), cp=cast(Group, SimpleNamespace(size=2))), kind="ring")
    assert model.row_parts is not None and model.mask_form == "rule"
    router = model.moe_layers()[0].router
    router.__class__ = type("LooksAhead", (type(router),), {"causal": "within_sequence"})
    with pytest.raises(ConfigError, match="LooksAhead is not strictly causal and does not declare sees_whole_rows"):
        share_rows(model, Mesh.of_one(), kind="ulysses")
    type(router).sees_whole_rows = True
    share_rows(model, Mesh.of_one(), kind="ulysses")
