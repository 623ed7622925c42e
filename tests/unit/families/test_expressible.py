"""What a dense family has and has not, and which family a model is refused by."""

from typing import Any

import pytest

from tests.builders import tiny_model_config
from trainer.families.expressible import inexpressible
from trainer.families.registry import FAMILIES, choose_family
from trainer.models.config import ModelConfig

LATE = {"window": 5, "window_pattern": ["full", "full", "sliding"]}
BIASES = {"qkv_bias": True, "out_bias": True}
LATENT = {"kv_lora_rank": 12, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 8}


def _dense(**fields: Any) -> ModelConfig:
    return ModelConfig.model_validate({**tiny_model_config({}, num_layers=3, **fields).model_dump(), "moe": None})


@pytest.mark.parametrize(
    ("name", "fields", "keys"),
    [
        ("llama", {"qk_norm": True}, {"qk_norm"}),
        ("llama", {"attention": {"qkv_bias": True}}, {"attention.out_bias"}),
        ("llama", {"attention": {"window": 5}}, {"attention.window"}),
        ("llama", {"num_heads": 6, "attention": {"head_dim": 4}}, {"num_heads"}),
        ("llama", {"activation": "gelu"}, {"activation"}),
        ("llama", {"attention": {"rotary_fraction": 0.5}}, {"attention.rotary_fraction"}),
        ("llama", {"norm": "rms_plus_one", "logit_softcap": 30.0}, {"norm", "logit_softcap"}),
        ("mistral", {"attention": {**LATE, "qkv_bias": True}}, {"attention.window", "attention.qkv_bias"}),
        ("qwen2", {}, {"attention.qkv_bias"}),
        ("qwen2", {"attention": BIASES}, {"attention.out_bias"}),
        ("qwen3", {}, {"qk_norm"}),
        ("qwen3", {"qk_norm": True, "attention": {"qk_norm_over": "all_heads"}}, {"attention.qk_norm_over"}),
        ("qwen3", {"attention": {"latent": LATENT}, "num_kv_heads": None}, {"attention.latent", "qk_norm"}),
    ],
)
def test_what_a_dense_family_cannot_express_is_named(name: str, fields: dict[str, Any], keys: set[str]) -> None:
    problems = inexpressible(FAMILIES[name], _dense(**fields))
    assert {problem.key for problem in problems} == keys, problems


def test_a_dense_model_is_no_mixture_and_a_mixture_is_not_dense() -> None:
    dense, mixture = _dense(activation="gelu"), tiny_model_config({}, activation="gelu")
    nearest = "auto: no family can express this model; the nearest is"
    assert choose_family(dense) == f"{nearest} llama: model.activation: gelu: llama would have swiglu"
    assert choose_family(mixture) == f"{nearest} mixtral: model.activation: gelu: mixtral would have swiglu"
    assert choose_family(dense, "dots1") == (
        "dots1 cannot express this model: model.moe: null: a dense model is no dots1; change it, or use another "
        "target, or auto"
    )
    assert choose_family(mixture, "llama") == (
        "llama cannot express this model: model.moe: 4 experts: llama is dense; change it, or use another target, or "
        "auto"
    )
