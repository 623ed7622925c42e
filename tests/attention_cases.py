"""Attention of transformers' models beyond that of Qwen3-MoE: a family, and what `model` and `model.moe` say of it."""

from typing import Any

# S tokens in a row.

_GATED = {"num_shared_experts": 1, "shared_gate": True}
_GROUPS = {
    "num_experts": 8,
    "num_shared_experts": 1,
    "router": {"kind": "group_limited", "groups": 4, "groups_kept": 2, "top_k": 3, "bias_update_rate": 0.1},
}
_ALL_HEADS = {"qk_norm": True, "attention": {"qk_norm_over": "all_heads"}}
_CLIPPED = {"qk_norm": True, "num_kv_heads": 1, "attention": {"qk_norm_over": "all_heads", "clip_qkv": 0.7}}
_LIKE_GEMMA = {"qk_norm": True, "norm": "rms_plus_one", "logit_softcap": 1.5}
_PARTLY = {"rotary_fraction": 0.5, "qkv_bias": True}


def attention_cases(S: int) -> dict[str, tuple[str, dict[str, Any], dict[str, Any]]]:
    """Return cases for rows of S tokens, which are longer than the original length of scaled positions."""
    found: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
        "biases": ("qwen3_moe", {"attention": {"qkv_bias": True, "out_bias": True}}, {}),
        "biases of queries, keys and values": ("qwen2_moe", {"attention": {"qkv_bias": True}}, _GATED),
        "norm over all heads": ("olmoe", _ALL_HEADS, {}),
        "norm over all heads, clipped": ("olmoe", _CLIPPED, {}),
        "norms of 1 + w, capped logits": (
            "qwen3_moe",
            {"qk_norm": True, "norm": "rms_plus_one", "logit_softcap": 1.5},
            {},
        ),
        "partly rotated": ("glm4_moe", {"qk_norm": True, "attention": _PARTLY}, _GROUPS),
        "partly rotated, without norms": ("glm4_moe", {"qk_norm": False, "attention": _PARTLY}, _GROUPS),
    }
    long = {"factor": 4.0, "original_length": S // 2}
    yarn = {"kind": "yarn", **long, "beta_fast": 1.0, "beta_slow": 0.1}
    scalings = {
        "linear": {"kind": "linear", "factor": 3.0},
        "dynamic": {"kind": "dynamic", **long},
        "yarn": yarn,
        "yarn, not truncated": {**yarn, "truncate": False},
        "yarn by its scales": {**yarn, "mscale": 2.0, "mscale_all_dim": 0.5},
        "llama3": {"kind": "llama3", **long, "low_freq_factor": 0.1, "high_freq_factor": 0.5},
    }
    for name, scaling in scalings.items():
        found[name] = ("qwen3_moe", {"attention": {"head_dim": 16}, "rope_scaling": scaling}, {})
    for family, window, pattern, moe in (
        ("mixtral", 3, ["sliding"], {}),
        ("dots1", 3, ["sliding", "full"], _GROUPS),
        ("dots1", 2, ["full", "full", "sliding"], _GROUPS),
        ("qwen2_moe", 2, ["full", "sliding", "full", "sliding"], _GATED),
    ):
        name = f"windows of {window}: {', '.join(pattern)}"
        slides = {"window": window, "window_pattern": pattern}
        found[name] = (family, {"num_layers": max(2, len(pattern)), "attention": slides}, moe)
    both = {"attention": {**_PARTLY, "head_dim": 16}, "rope_scaling": {**yarn, "attention_factor": 0.6}}
    found["yarn by a factor, partly rotated"] = ("glm4_moe", both, _GROUPS)
    return found
