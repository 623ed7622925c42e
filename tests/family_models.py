"""A tiny model of every family, with whatever is special about it, as values of our `model` section."""

from typing import Any, Final

SIZES: Final = {
    "num_layers": 2,
    "d_model": 16,
    "num_heads": 4,
    "num_kv_heads": 2,
    "d_ff": 24,
    "seq_len": 32,
    "init_std": 0.3,
}
MOE: Final = {"num_experts": 5, "d_ff": 12}
SHARED: Final = {**MOE, "num_experts": 8, "num_shared_experts": 2}
GROUPS: Final = {
    "kind": "group_limited",
    "groups": 4,
    "groups_kept": 2,
    "top_k": 3,
    "scale": 2.5,
    "bias_update_rate": 0.1,
}
RAW_GROUPS: Final = {**GROUPS, "score": "softmax", "group_score": "best", "normalize": False, "bias_update_rate": 0.0}
_YARN: Final = {"kind": "yarn", "factor": 4.0, "original_length": 8, "mscale": 0.8, "mscale_all_dim": 0.7}
_WIDTHS: Final = {
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "q_lora_rank": 10,
}
_LLAMA3: Final = {"kind": "llama3", "factor": 4.0, "original_length": 8}
_WINDOWS: Final = {"window": 4, "window_pattern": ["full", "sliding"]}
_LATENT: Final = {"attention": {"latent": _WIDTHS}, "num_kv_heads": None}
_SINKS: Final = {"sinks": True, "qkv_bias": True, "out_bias": True}
_CLAMPED: Final = {**MOE, "expert_bias": True, "router": {"kind": "top_k", "top_k": 3, "gate_bias": True}}
MODELS: Final[dict[str, dict[str, Any]]] = {
    "mixtral": {"moe": MOE, "tie_embeddings": True, "attention": {"window": 4}},
    "qwen2_moe": {"moe": {**MOE, "num_shared_experts": 1, "shared_d_ff": 10, "shared_gate": True}},
    "qwen3_moe": {"moe": {**MOE, "first_dense_layers": 1}, "qk_norm": True, "attention": {"head_dim": 6}},
    "dots1": {"moe": {**SHARED, "router": GROUPS}, "qk_norm": True, "attention": _WINDOWS},
    "glm4_moe": {"moe": {**SHARED, "router": GROUPS}, "attention": {"qkv_bias": True, "rotary_fraction": 0.5}},
    "olmoe": {"moe": MOE, "qk_norm": True, "attention": {"qk_norm_over": "all_heads", "clip_qkv": 2.0}},
    "deepseek_v2": {"moe": {**SHARED, "router": RAW_GROUPS}, **_LATENT, "rope_scaling": _YARN},
    "deepseek_v3": {"moe": {**SHARED, "router": GROUPS}, **_LATENT},
    "gpt_oss": {"moe": _CLAMPED, "attention": {**_WINDOWS, **_SINKS}, "activation": "clamped_swiglu"},
    "llama": {"moe": None, "attention": {"qkv_bias": True, "out_bias": True}, "rope_scaling": _LLAMA3},
    "mistral": {"moe": None, "attention": {"window": 4, "head_dim": 6}},
    "qwen2": {"moe": None, "tie_embeddings": True, "attention": {**_WINDOWS, "qkv_bias": True}},
    "qwen3": {"moe": None, "qk_norm": True, "init_std": 0.2, "attention": {"head_dim": 6}},
}
"""By family."""
LATENT_FAMILIES: Final = ("deepseek_v2", "deepseek_v3")
"""Their heads share no keys."""
