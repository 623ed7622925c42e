"""Keys that the configs of all families share: widths, heads, norm. Imports no torch."""

from collections.abc import Sequence
from typing import Any

from trainer.families.hf_config import ForeignConfigError, HFConfig
from trainer.families.rope_keys import rope_from_hf, rope_to_hf
from trainer.models.config import ModelConfig


def shared_to_hf(model: ModelConfig) -> dict[str, Any]:
    """Return the keys of every decoder."""
    return {
        "hidden_size": model.d_model,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads or model.num_heads,
        "hidden_act": "silu",
        "initializer_range": model.init_std,
        "rms_norm_eps": model.norm_eps,
        **rope_to_hf(model),
        "tie_word_embeddings": model.tie_embeddings,
        "attention_dropout": 0.0,
        "use_cache": True,
    }


def shared_from_hf(hf: HFConfig, *, default_theta: float = 10000.0) -> dict[str, Any]:
    """Read the keys of every decoder but those of its heads."""
    hf.expect("hidden_act", "silu")
    hf.expect("quantization_config")
    return {
        "vocab_size": hf.integer("vocab_size"),
        "num_layers": hf.integer("num_hidden_layers"),
        "d_model": hf.integer("hidden_size"),
        "num_heads": hf.integer("num_attention_heads"),
        "seq_len": hf.integer("max_position_embeddings"),
        "norm_eps": hf.number("rms_norm_eps"),
        "tie_embeddings": hf.boolean("tie_word_embeddings", default=False),
        **rope_from_hf(hf, default_theta=default_theta),
    }


def grouped_to_hf(model: ModelConfig) -> dict[str, Any]:
    """Return the keys of a decoder with grouped-query attention."""
    return shared_to_hf(model) | {"head_dim": model.head_dim}


def grouped_from_hf(hf: HFConfig, *, default_theta: float = 10000.0, has_fraction: bool = False) -> dict[str, Any]:
    """Read the keys of a decoder with grouped-query attention; `attention` is among them.

    `has_fraction`: only a part of each head may be rotated.
    """
    values = shared_from_hf(hf, default_theta=default_theta)
    d_model, num_heads = values["d_model"], values["num_heads"]
    head_dim = hf.integer("head_dim", default=d_model // max(num_heads, 1))
    attention: dict[str, Any] = {} if head_dim * num_heads == d_model else {"head_dim": head_dim}
    fraction = values.pop("rotary_fraction", None)
    if fraction is not None and not has_fraction:
        raise ForeignConfigError(f"partial_rotary_factor: {fraction} is not supported by {hf.values.get('model_type')}")
    if fraction is not None:
        attention["rotary_fraction"] = fraction
    return values | {"num_kv_heads": hf.integer("num_key_value_heads", default=num_heads), "attention": attention}


def dense_to_hf(model: ModelConfig) -> dict[str, Any]:
    """Return the keys of a decoder without experts."""
    return grouped_to_hf(model) | {"intermediate_size": model.d_ff}


def dense_from_hf(hf: HFConfig) -> dict[str, Any]:
    """Read the keys of a decoder without experts."""
    return grouped_from_hf(hf) | {"d_ff": hf.integer("intermediate_size"), "moe": None}


def with_biases(hf: HFConfig, values: dict[str, Any]) -> dict[str, Any]:
    """Add `attention_bias` where that means all four projections."""
    if hf.boolean("attention_bias", default=False):
        values["attention"] |= {"qkv_bias": True, "out_bias": True}
    return values


def balance_to_hf(model: ModelConfig) -> dict[str, Any]:
    """Return the weight of the balance loss in transformers' convention, which is k times ours."""
    assert model.moe is not None, "refused before its config is written"
    balance, top_k = model.moe.balance, getattr(model.moe.router, "top_k", 1)
    coef = balance.coef if balance.convention == "hf" else balance.coef / top_k
    return {"router_aux_loss_coef": coef, "output_router_logits": False}


def balance_from_hf(hf: HFConfig) -> dict[str, Any]:
    """Read the weight of the balance loss."""
    return {"coef": hf.number("router_aux_loss_coef", default=0.001), "convention": "hf"}


def softmax_router_from_hf(hf: HFConfig) -> dict[str, Any]:
    """Read the router of Qwen's mixtures and OLMoE."""
    return {
        "kind": "top_k",
        "top_k": hf.integer("num_experts_per_tok"),
        "normalize": hf.boolean("norm_topk_prob", default=False),
    }


def moe_layer_values(layers: Sequence[int], num_layers: int) -> dict[str, Any]:
    """Return the keys of `model.moe` for a pattern of MoE layers."""
    layers = list(layers)
    if not layers:
        raise ForeignConfigError("no layer has experts, and those of this family have some")
    if layers == list(range(layers[0], num_layers)):
        return {"first_dense_layers": layers[0]}
    for every in range(2, num_layers):
        if layers == [i for i in range(num_layers) if (i + 1) % every == 0]:
            return {"every": every}
    return {"layers": layers}
