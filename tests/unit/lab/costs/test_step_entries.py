"""Whole steps: the same global batch for every layout, and a twin with the same FLOPs."""

from dataclasses import replace
from typing import cast

import pytest
import torch

from trainer.distributed.collectives import Group
from trainer.distributed.mesh import Mesh
from trainer.experiment import ExperimentConfig
from trainer.lab.costs.deepspeed_peer import why_not_deepspeed
from trainer.lab.costs.step_entries import (
    MixtralStep,
    OurStep,
    batches_of,
    build_step_apart,
    dense_twin,
    logits_for,
)
from trainer.lab.costs.transformers_peer import why_not_mixtral
from trainer.models.flops import model_size

CPU = torch.device("cpu")


def tiny(**moe: object) -> ExperimentConfig:
    """Return a config of one tiny block."""
    return ExperimentConfig.model_validate(
        {
            "name": "tiny",
            "model": {
                "num_layers": 1,
                "d_model": 16,
                "num_heads": 2,
                "seq_len": 8,
                "moe": {"num_experts": 4, "d_ff": 8, "router": {"kind": "top_k", "top_k": 2}, **moe},
            },
            "train": {"global_batch_size": 4},
            "parallel": {"micro_batch_size": 2, "device": "cpu"},
        }
    )


class _Rank:
    """A mesh's `world` of which only size and index are asked."""

    def __init__(self, index: int, size: int) -> None:
        self.index, self.size = index, size


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_global_batch_is_the_same_for_every_number_of_ranks(size: int) -> None:
    config, whole = tiny(), batches_of(tiny(), Mesh.of_one(), turn=3)
    rows = []
    for rank in range(size):
        mesh = replace(Mesh.of_one(), world=cast(Group, _Rank(rank, size)))
        batches = batches_of(config, mesh, turn=3)
        assert all(len(batch.tokens) == min(2, 4 // size) for batch in batches)
        rows += [batch.sample_id[:, :1] + 1000 * batch.tokens for batch in batches]
    expected = torch.cat([batch.sample_id[:, :1] + 1000 * batch.tokens for batch in whole])
    assert torch.equal(torch.cat(rows), expected)


def test_a_rank_that_exchanges_nothing_has_its_part_of_rows_and_experts() -> None:
    mesh = replace(Mesh.of_one(), world=cast(Group, _Rank(1, 2)))
    step = cast(OurStep, build_step_apart(mesh, CPU, tiny())["step"])
    step.prepare(0)
    step.run()
    assert sum(len(batch.tokens) for batch in step.batches) == 2
    (moe,) = step.model.moe_layers()
    assert len(moe.experts.w_in) == 2 and step.mesh.world.size == 1


@pytest.mark.parametrize("shared", [0, 1])
def test_the_dense_twin_has_the_flops_of_the_active_experts(shared: int) -> None:
    config = tiny(num_shared_experts=shared)
    ours, twin = (OurStep(one, Mesh.of_one(), CPU).model for one in (config, dense_twin(config)))
    router = 2 * 16 * 4
    assert model_size(ours).forward_flops_per_token - router == model_size(twin).forward_flops_per_token


@pytest.mark.parametrize("kind", ["own", "skewed"])
def test_both_models_take_steps_and_have_the_same_number_of_parameters(kind: str) -> None:
    given = logits_for(tiny(), kind, 0)
    ours, theirs = OurStep(tiny(), Mesh.of_one(), CPU, given), MixtralStep(tiny(), Mesh.of_one(), CPU, "eager", given)
    before = [p.detach().clone() for p in theirs.model.parameters()]
    for step in (ours, theirs):
        step.prepare(0)
        step.run()
    assert any(not torch.equal(a, b) for a, b in zip(before, theirs.model.parameters(), strict=True))
    mine, other = ours.facts(), theirs.facts()
    assert mine["parameters"] == other["parameters"]
    assert min(mine["saved_bytes_per_token"], other["saved_bytes_per_token"]) > 0
    assert min(mine["peak_bytes"], other["peak_bytes"]) > 4 * mine["parameters"], "at least the gradients"


def test_models_that_another_library_lacks_are_named() -> None:
    shared = tiny(num_shared_experts=1)
    assert why_not_mixtral(tiny()) is None and why_not_deepspeed(tiny()) is None
    assert why_not_mixtral(shared) == why_not_deepspeed(shared) == "not every block has routed experts and nothing else"
    capacity = tiny(capacity={"factor": 1.0})
    assert why_not_mixtral(capacity) == "its router is not top_k, or drops tokens"
    normed = ExperimentConfig.model_validate(
        {"name": "x", "model": {"qk_norm": True, "tie_embeddings": True}, "train": {"dtype": "bfloat16"}}
    )
    assert why_not_mixtral(normed) == "Mixtral has no qk_norm, tie_embeddings"
    latents = ExperimentConfig.model_validate({"name": "x", "model": {"attention": {"latent": {}}}})
    assert why_not_mixtral(latents) == "Mixtral has no attention.latent"
    assert why_not_deepspeed(normed) == "its loop trains in float32 here, not bfloat16"
