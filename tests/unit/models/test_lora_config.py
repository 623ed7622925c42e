"""Targets and rank of adapters against the model: what is allowed, and each refusal in full."""

from typing import Any

import pytest
from pydantic import ValidationError

from tests.builders import latent_attention, tiny_model_config
from trainer.experiment import ExperimentConfig
from trainer.models.config import ModelConfig
from trainer.models.lora_config import LoRAConfig

DENSE: dict[str, Any] = {"num_layers": 2, "d_model": 16, "num_heads": 4, "d_ff": 24, "moe": None}
MOE: dict[str, Any] = {"num_layers": 2, "d_model": 16, "num_heads": 4, "moe": {"num_experts": 4, "d_ff": 12}}
ATTENTION = "use some of attention, dense, attention.qkv, attention.out, dense.w_in, dense.w_out"

REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "experts of a dense model": (
        DENSE,
        {"targets": ["experts"]},
        f"lora.targets.0: experts: this model has no experts (model.moe: null); {ATTENTION}",
    ),
    "shared experts that are not there": (
        MOE,
        {"targets": ["attention", "shared.w_in"]},
        "lora.targets.1: shared.w_in: this model has no shared experts; use some of attention, experts,",
    ),
    "dense blocks of a mixture": (MOE, {"targets": ["dense"]}, "dense: this model has no dense blocks; use some of"),
    "a router": (
        MOE,
        {"targets": ["router"]},
        "router: a router is small and has no adapter; to train it, use lora.trains: [router]",
    ),
    "queries of latents": (
        {**DENSE, **latent_attention()},
        {"targets": ["attention.qkv"]},
        "attention.qkv: latent attention has other matrices; use some of attention, dense, attention.qkv_a, "
        "attention.q_b, attention.kv_b, attention.out",
    ),
    "peft's names": (MOE, {"targets": ["q_proj"]}, "q_proj is no matrix of this model; use some of attention, experts"),
    "a typing error": (MOE, {"targets": ["expert"]}, "expert is no matrix of this model; did you mean experts?"),
    "a rank beyond the matrix": (
        MOE,
        {"rank": 13},
        "lora.rank: 13 is more than a matrix can have (experts.w_out is 16 x 12); use at most 12",
    ),
    "rank 0": (MOE, {"rank": 0}, "greater than 0"),
    "alpha 0": (MOE, {"alpha": 0}, "greater than 0"),
    "no targets": (MOE, {"targets": []}, "at least 1 item"),
    "a target twice": (
        MOE,
        {"targets": ["experts", "experts"]},
        "targets: 'experts' is listed twice; list each target once",
    ),
    "a role of others": (MOE, {"trains": ["norm"]}, "trains.0: norm is not a role of weights; did you mean norms?"),
    "dropout": (MOE, {"dropout": 0.1}, "Extra inputs are not permitted"),
}


@pytest.mark.parametrize(("model", "lora", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_does_not_fit_is_refused(model: dict, lora: dict, message: str) -> None:
    with pytest.raises(ValidationError) as error:
        ModelConfig.model_validate({**model, "lora": {"rank": 2, **lora}})
    assert message in str(error.value)


@pytest.mark.parametrize("kernel", ["triton", "mxfp8", "sonicmoe", "scattermoe", "trainer.ops.expert_ffn:loop_ffn"])
def test_kernels_without_adapters_are_refused_for_experts_only(kernel: str) -> None:
    values = {"name": "x", "parallel": {"experts_kernel": kernel, "device": "cuda"}, "train": {"dtype": "bfloat16"}}
    sizes = {"d_model": 64, "moe": {"d_ff": 64, "num_shared_experts": 1}}
    with pytest.raises(ValidationError) as error:
        ExperimentConfig.model_validate({**values, "model": {**sizes, "lora": {}}})
    assert (
        f"parallel.experts_kernel: {kernel} computes no adapters (model.lora) of experts; use auto, or "
        "model.lora.targets: [attention, shared]"
    ) in str(error.value)
    ExperimentConfig.model_validate({**values, "model": {**sizes, "lora": {"targets": ["attention"]}}})


def test_null_is_every_matrix_that_the_model_has() -> None:
    config = tiny_model_config({"num_shared_experts": 1, "first_dense_layers": 1}, lora={"rank": 2})
    lora = config.lora
    assert lora is not None
    found = {each.target: each.count for each in lora.chosen(config.projections())}
    both = {"attention.qkv": 2, "attention.out": 2}
    assert found == both | {f"{g}.{w}": 1 for g in ("dense", "shared", "experts") for w in ("w_in", "w_out")}


def test_the_scale_is_that_of_peft() -> None:
    assert LoRAConfig(rank=16, alpha=8.0).scale == 0.5
    assert LoRAConfig(rank=16, alpha=8.0, use_rslora=True).scale == 2.0


def test_a_model_without_adapters_is_the_same_apart_from_them() -> None:
    config = tiny_model_config(lora={"rank": 2})
    assert config.merged == tiny_model_config() and config.merged.lora is None
