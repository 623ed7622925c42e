"""Every family is transformers': their names on disk, their configs, and what they cannot express."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from tests.builders import tiny_model_config
from trainer.families.expressible import inexpressible, inference_values
from trainer.families.hf_config import ForeignConfigError
from trainer.families.link import coverage_problems
from trainer.families.registry import FAMILIES, choose_family, family_of
from trainer.models.config import ModelConfig
from trainer.models.gpt import GPT

V = 32
GROUPS = {"kind": "group_limited", "groups": 4, "groups_kept": 2, "top_k": 3, "scale": 2.5}
BEST = {**GROUPS, "group_score": "best"}
BIAS = {"kind": "bias_balanced", "top_k": 3, "normalize": False}
RAW = {"kind": "top_k", "top_k": 3, "normalize": False, "scale": 1.5}
RAW_GROUPS = {**GROUPS, "score": "softmax", "group_score": "best", "normalize": False}
YARN = {"kind": "yarn", "factor": 4.0, "original_length": 8, "beta_fast": 4.0, "mscale": 0.8, "truncate": False}
LATENT = {"kv_lora_rank": 12, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 8}
GATED = {"num_shared_experts": 2, "shared_d_ff": 10, "shared_gate": True}
HALF = {"rotary_fraction": 0.5, "qkv_bias": True}
LATE = {"window": 5, "window_pattern": ["full", "full", "sliding"]}
EARLY = {"window": 5, "window_pattern": ["sliding", "full", "full"]}
BIASES = {"qkv_bias": True, "out_bias": True}
LLAMA3 = {"kind": "llama3", "factor": 8.0, "original_length": 8}
ONLY_LATENT = {"attention": {"latent": LATENT}, "num_kv_heads": None}
ALL_HEADS = {"qk_norm_over": "all_heads"}
DYNAMIC = {"kind": "dynamic", "factor": 2.0, "original_length": 8}
CLAMPED = {"expert_bias": True, "router": {"kind": "top_k", "top_k": 3, "gate_bias": True}}
SINKS = {"sinks": True, "qkv_bias": True, "out_bias": True, "head_dim": 6}
SHARED = {"num_experts": 8, "num_shared_experts": 2}


def _case(moe: dict[str, Any], **fields: Any) -> ModelConfig:
    # Far from the defaults, so that a key that is not written or not read shows.
    unusual = {"rope_theta": 50.0, "norm_eps": 0.01, "num_layers": 3, "seq_len": 24}
    return tiny_model_config(moe, **{**unusual, **fields})


def _dense(**fields: Any) -> ModelConfig:
    return ModelConfig.model_validate({**_case({}, **fields).model_dump(), "moe": None})


def _latent(moe: dict[str, Any], *, q_lora_rank: int | None = None, **fields: Any) -> ModelConfig:
    has_biases = q_lora_rank is not None
    attention = {"latent": {**LATENT, "q_lora_rank": q_lora_rank}, "qkv_bias": has_biases, "out_bias": has_biases}
    return _case(moe, num_kv_heads=None, attention=attention, **fields)


CASES: dict[str, tuple[str, ModelConfig]] = {
    "mixtral": ("mixtral", _case({"router": {"kind": "top_k", "top_k": 3}})),
    "tied, one key head": ("mixtral", _case({}, tie_embeddings=True, num_kv_heads=1)),
    "switch with jitter": ("qwen3_moe", _case({"router": {"kind": "switch"}}, qk_norm=True)),
    "wide heads": ("qwen3_moe", _case({}, qk_norm=True, attention={"head_dim": 10})),
    "a dense layer": ("qwen3_moe", _case({"first_dense_layers": 1}, qk_norm=True, num_kv_heads=None)),
    "every second": ("qwen3_moe", _case({"every": 2}, qk_norm=True, num_layers=4)),
    "raw scores": ("qwen3_moe", _case({"router": {"kind": "top_k", "top_k": 2, "normalize": False}}, qk_norm=True)),
    "any layers": ("qwen3_moe", _case({"layers": [0, 2]}, qk_norm=True)),
    "gated shared expert": ("qwen2_moe", _case({**GATED})),
    "groups": ("dots1", _case({**SHARED, "router": GROUPS, "first_dense_layers": 1}, qk_norm=True)),
    "no groups": ("dots1", _case({**SHARED, "router": BIAS}, qk_norm=True)),
    "all groups": ("dots1", _case({**SHARED, "router": {**GROUPS, "groups_kept": 4}}, qk_norm=True)),
    "biases of queries": ("qwen2_moe", _case({**GATED}, attention={"qkv_bias": True})),
    "all biases": ("qwen3_moe", _case({}, qk_norm=True, attention={"qkv_bias": True, "out_bias": True})),
    "norms over all heads": ("olmoe", _case({}, qk_norm=True, attention=ALL_HEADS)),
    "clipped": ("olmoe", _case({}, qk_norm=True, attention={**ALL_HEADS, "clip_qkv": 2.0})),
    "half rotated": (
        "glm4_moe",
        _case({**SHARED, "router": BIAS}, attention=HALF),
    ),
    "window": ("mixtral", _case({}, attention={"window": 5})),
    "window and norms": ("qwen3_moe", _case({}, qk_norm=True, attention={"window": 5})),
    "some windows": ("qwen2_moe", _case({**GATED}, attention={"window": 5, "window_pattern": ["full", "sliding"]})),
    "windows at the end": ("dots1", _case({**SHARED, "router": BIAS}, qk_norm=True, attention=LATE)),
    "yarn": ("mixtral", _case({}, rope_scaling=YARN)),
    "llama3": ("mixtral", _case({}, rope_scaling=LLAMA3)),
    "linear": ("qwen3_moe", _case({}, qk_norm=True, rope_scaling={"kind": "linear", "factor": 2.0})),
    "dynamic": ("mixtral", _case({}, rope_scaling={"kind": "dynamic", "factor": 2.0, "original_length": 32})),
    "latent": ("deepseek_v3", _latent({**SHARED, "router": GROUPS, "first_dense_layers": 1}, q_lora_rank=10)),
    "latent, yarn": ("deepseek_v3", _latent({**SHARED, "router": BIAS}, rope_scaling={**YARN, "mscale_all_dim": 0.7})),
    "latent, softmax": ("deepseek_v2", _latent({**SHARED, "router": RAW})),
    "latent, softmax in groups": ("deepseek_v2", _latent({**SHARED, "router": RAW_GROUPS}, q_lora_rank=10)),
    "sinks, biases, clamped": ("gpt_oss", _case(CLAMPED, activation="clamped_swiglu", attention=SINKS)),
    "sinks, windows, yarn": (
        "gpt_oss",
        _case(
            CLAMPED,
            activation="clamped_swiglu",
            swiglu_limit=5.0,
            swiglu_alpha=1.5,
            attention={**SINKS, "window": 5, "window_pattern": ["sliding", "full"]},
            rope_scaling=YARN,
        ),
    ),
    "dense": ("llama", _dense(num_kv_heads=1, tie_embeddings=True)),
    "dense, all biases, llama3": ("llama", _dense(attention=BIASES, rope_scaling=LLAMA3)),
    "dense, wide heads": ("llama", _dense(num_kv_heads=None, attention={"head_dim": 10})),
    "dense, window": ("mistral", _dense(attention={"window": 5, "head_dim": 6}, rope_scaling=YARN)),
    "dense, biases of queries": ("qwen2", _dense(attention={"qkv_bias": True})),
    "dense, biases and late windows": ("qwen2", _dense(attention={**LATE, "qkv_bias": True, "head_dim": 6})),
    "dense, norms": ("qwen3", _dense(qk_norm=True, attention={**BIASES, "head_dim": 6})),
    "dense, norms and early windows": ("qwen3", _dense(qk_norm=True, attention=EARLY)),
    "no norms of heads": ("glm4_moe", _case({**SHARED, "router": GROUPS, "first_dense_layers": 1})),
}
parametrized = pytest.mark.parametrize(("name", "model"), CASES.values(), ids=CASES.keys())


@parametrized
def test_auto_chooses_the_family_whose_config_says_the_same(name: str, model: ModelConfig) -> None:
    family = choose_family(model)
    assert not isinstance(family, str) and family.name == name
    returned = ModelConfig.model_validate(family.from_hf(json.loads(json.dumps(family.to_hf(model, V)))))
    assert inference_values(returned) == inference_values(model)


@parametrized
def test_links_cover_our_model_once(name: str, model: ModelConfig) -> None:
    with torch.device("meta"):
        ours = GPT(model, V)
    shapes = {key: tuple(tensor.shape) for key, tensor in [*ours.named_parameters(), *ours.named_buffers()]}
    family = FAMILIES[name]
    zero = set(family.zero_tensors(model))
    assert zero == ({key for key in shapes if key.endswith("router.bias")} if name == "deepseek_v2" else set())
    shapes = {key: shape for key, shape in shapes.items() if key not in zero}
    assert list(coverage_problems(family.links(model, V), shapes)) == []


@parametrized
def test_names_and_shapes_are_those_that_transformers_writes(name: str, model: ModelConfig, tmp_path: Path) -> None:
    """And the config that it writes reads as the same model."""
    family = FAMILIES[name]
    (tmp_path / "config.json").write_text(json.dumps(family.to_hf(model, V)))
    theirs = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    assert type(theirs).__name__ == family.architecture
    theirs.save_pretrained(tmp_path / "saved")
    with safe_open(tmp_path / "saved" / "model.safetensors", "pt") as file:
        written = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 - no mapping
    assert written == {link.theirs: link.shape for link in family.links(model, V)}
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert family_of(config) is family
    assert inference_values(ModelConfig.model_validate(family.from_hf(config))) == inference_values(model)


@pytest.mark.parametrize(
    ("name", "moe", "fields", "keys"),
    [
        ("mixtral", {}, {"qk_norm": True}, {"qk_norm"}),
        ("mixtral", {"num_shared_experts": 1}, {}, {"moe.num_shared_experts"}),
        ("mixtral", {"first_dense_layers": 1}, {}, {"moe.layers", "d_ff"}),
        ("mixtral", {"router": {"kind": "top_k", "normalize": False}}, {}, {"moe.router.normalize"}),
        ("mixtral", {"router": {"kind": "top_k", "null_experts": 2}}, {}, {"moe.router.null_experts"}),
        ("mixtral", {}, {"activation": "gelu"}, {"activation"}),
        ("qwen3_moe", {"router": {"kind": "top_k", "scale": 2.0}}, {"qk_norm": True}, {"moe.router.scale"}),
        ("qwen3_moe", {"router": {"kind": "top_k", "score": "sigmoid"}}, {"qk_norm": True}, {"moe.router.score"}),
        ("qwen3_moe", {"router": {"kind": "top_p"}}, {"qk_norm": True}, {"moe.router.kind"}),
        ("qwen3_moe", {"router": {"kind": "bias_balanced"}}, {"qk_norm": True}, {"moe.router.kind"}),
        ("dots1", {"router": BIAS}, {"qk_norm": True}, {"moe.num_shared_experts"}),
        ("dots1", {**SHARED, "router": BEST}, {"qk_norm": True}, {"moe.router.group_score"}),
        ("dots1", {**SHARED, "router": BIAS, "every": 2}, {"qk_norm": True}, {"moe.layers"}),
        ("dots1", {**SHARED, "router": BIAS}, {}, {"qk_norm"}),
        ("dots1", {**SHARED, "router": BIAS, "shared_gate": True}, {"qk_norm": True}, {"moe.shared_gate"}),
        ("dots1", {**SHARED, "router": BIAS, "shared_d_ff": 20}, {"qk_norm": True}, {"moe.shared_d_ff"}),
        ("qwen2_moe", {}, {}, {"moe.num_shared_experts"}),
        ("qwen2_moe", {}, {"qk_norm": True}, {"moe.num_shared_experts", "qk_norm"}),
        ("qwen3_moe", {}, {"qk_norm": True, "attention": {"qkv_bias": True}}, {"attention.out_bias"}),
        ("mixtral", {}, {"attention": {"latent": LATENT}, "num_kv_heads": None}, {"attention.latent"}),
        ("mixtral", {}, {"attention": {"rotary_fraction": 0.5}}, {"attention.rotary_fraction"}),
        ("mixtral", {"router": {"kind": "top_k", "gate_bias": True}}, {}, {"moe.router.gate_bias"}),
        ("mixtral", {}, {"attention": LATE}, {"attention.window"}),
        ("olmoe", {}, {"qk_norm": True, "attention": {**ALL_HEADS, "window": 5}}, {"attention.window"}),
        ("mixtral", {}, {"rope_scaling": DYNAMIC}, {"rope_scaling.kind"}),
        ("qwen3_moe", {}, {"qk_norm": True, "attention": {"clip_qkv": 1.0}}, {"attention.clip_qkv"}),
        ("deepseek_v3", {**SHARED, "router": BIAS}, {}, {"attention.latent"}),
        ("mixtral", {"expert_bias": True}, {}, {"moe.expert_bias"}),
        ("mixtral", {}, {"activation": "clamped_swiglu"}, {"activation"}),
        ("mixtral", {}, {"attention": {"sinks": True}}, {"attention.sinks"}),
        (
            "gpt_oss",
            {},
            {"activation": "clamped_swiglu", "attention": SINKS},
            {"moe.expert_bias", "moe.router.gate_bias"},
        ),
        (
            "gpt_oss",
            {**CLAMPED, "num_shared_experts": 1},
            {"activation": "clamped_swiglu", "attention": SINKS},
            {"moe.num_shared_experts"},
        ),
        ("deepseek_v2", {"router": RAW}, {**ONLY_LATENT}, {"moe.num_shared_experts"}),
        (
            "deepseek_v2",
            {**SHARED, "router": {**RAW_GROUPS, "bias_update_rate": 0.1}},
            {**ONLY_LATENT},
            {"moe.router.bias_update_rate"},
        ),
        (
            "deepseek_v3",
            {**SHARED, "router": BIAS},
            {**ONLY_LATENT, "attention": {"latent": {**LATENT, "norm_eps": 1e-5}}},
            {"attention.latent.norm_eps"},
        ),
        ("qwen2_moe", {"num_shared_experts": 1}, {}, {"moe.shared_gate"}),
        ("glm4_moe", {**SHARED, "router": {**GROUPS, "groups": 8, "groups_kept": 4}}, {}, {"moe.router.groups"}),
    ],
)
def test_what_a_family_cannot_express_is_named(
    name: str, moe: dict[str, Any], fields: dict[str, Any], keys: set[str]
) -> None:
    problems = inexpressible(FAMILIES[name], _case(moe, **fields))
    assert {problem.key for problem in problems} == keys, problems


def test_the_nearest_family_is_one_whose_every_difference_is_known() -> None:
    """Not DeepSeek's, of which a model without latents can be told two differences only, since it has no config."""
    attention = {"qkv_bias": True, "clip_qkv": 1.0, "softcap": 2.0}
    refused = choose_family(_case({"router": {"kind": "top_k", "normalize": False}}, attention=attention))
    assert isinstance(refused, str) and "nearest is deepseek" not in refused
    assert "model.attention.softcap: 2.0" in refused and "model.attention.clip_qkv: 1.0" in refused


def test_settings_of_training_alone_are_expressible_everywhere() -> None:
    moe = {"balance": {"coef": 0.3}, "capacity": {"factor": 1.0}, "z_loss_coef": 0.2, "diversity_coef": 0.1}
    router = {"kind": "gshard", "random_second": True, "top_k_choices": [1, 2], "jitter": 0.1}
    model = _case({**moe, "router": router}, init_std=0.5, document_mask=True, vocab_z_loss_coef=0.1)
    assert inexpressible(FAMILIES["mixtral"], model) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type: 'gpt2' is not among mixtral"),
        ({"model_type": ["mixtral"]}, "model_type: ['mixtral'] is not among"),
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu' cannot be expressed here; only 'silu'"),
        ({"sliding_window": "wide"}, "sliding_window: 'wide' is not a number of the right type"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "rope_type: 'longrope' cannot be expressed here"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "steep": 1}}, "steep: 1 is unknown"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5 is not supported by mixtral"),
        ({"rope_parameters": {"rope_type": 3}}, "rope_type: 3 cannot be expressed here"),
        ({"rope_parameters": 3}, "rope_parameters: 3 is not a section"),
        ({"hidden_size": "16"}, "hidden_size: '16' is not a number"),
        ({"hidden_size": None}, "hidden_size: is missing"),
        ({"num_hidden_layers": True}, "num_hidden_layers: True is not a number"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings: 1 is neither true nor false"),
        ({"clip_everything": 8.0}, "clip_everything: 8.0 is unknown for mixtral"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: "),
        ({"model_type": "llama"}, "router_aux_loss_coef: 0.005 is unknown for llama"),
    ],
)
def test_a_config_that_would_be_another_model_is_refused(changes: dict[str, Any], message: str) -> None:
    config = FAMILIES["mixtral"].to_hf(_case({}), V)
    with pytest.raises(ForeignConfigError) as error:
        family_of(config | changes).from_hf(config | changes)
    assert message in str(error.value)
