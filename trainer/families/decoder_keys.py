"""Keys that the configs of all families share: widths, heads, positions, norm. Imports no torch."""

from collections.abc import Sequence
from typing import Any

from trainer.families.hf_config import ForeignConfigError, HFConfig
from trainer.models.config import ModelConfig


def shared_to_hf(model: ModelConfig) -> dict[str, Any]:
    """Return the keys of a decoder. `rope_theta` is the older name, which newer readers know too."""
    return {
        "hidden_size": model.d_model,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads or model.num_heads,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": model.seq_len,
        "initializer_range": model.init_std,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "rope_scaling": None,
        "tie_word_embeddings": model.tie_embeddings,
        "attention_dropout": 0.0,
        "use_cache": True,
    }


def shared_from_hf(hf: HFConfig, *, default_theta: float = 10000.0) -> dict[str, Any]:
    """Read the keys of a decoder."""
    d_model, num_heads = hf.integer("hidden_size"), hf.integer("num_attention_heads")
    head_dim = hf.integer("head_dim", default=d_model // max(num_heads, 1))
    hf.expect("hidden_act", "silu")
    hf.expect("quantization_config")
    values: dict[str, Any] = {
        "vocab_size": hf.integer("vocab_size"),
        "num_layers": hf.integer("num_hidden_layers"),
        "d_model": d_model,
        "num_heads": num_heads,
        "num_kv_heads": hf.integer("num_key_value_heads", default=num_heads),
        "seq_len": hf.integer("max_position_embeddings"),
        "rope_theta": _rope_theta(hf, default_theta),
        "norm_eps": hf.number("rms_norm_eps"),
        "tie_embeddings": hf.boolean("tie_word_embeddings", default=False),
    }
    if head_dim * num_heads != d_model:
        values["attention"] = {"head_dim": head_dim}
    return values


def _rope_theta(hf: HFConfig, default: float) -> float:
    """Return the base of the rotary frequencies, of either generation of names."""
    newer = hf.optional("rope_parameters") or {}
    if not isinstance(newer, dict):
        raise ForeignConfigError(f"rope_parameters: {newer!r} is not a section")
    rope = HFConfig({**newer, "rope_theta": newer.get("rope_theta", hf.optional("rope_theta"))})
    rope.expect("rope_type", "default")
    theta = rope.number("rope_theta", default=default)
    rope.expect("partial_rotary_factor", 1.0)
    rope.finish()
    hf.expect("rope_scaling")
    return theta


def balance_to_hf(model: ModelConfig) -> dict[str, Any]:
    """Return the weight of the balance loss in transformers' convention, which is k times ours."""
    assert model.moe is not None, "refused before its config is written"
    balance, top_k = model.moe.balance, getattr(model.moe.router, "top_k", 1)
    coef = balance.coef if balance.convention == "hf" else balance.coef / top_k
    return {"router_aux_loss_coef": coef, "output_router_logits": False}


def balance_from_hf(hf: HFConfig) -> dict[str, Any]:
    """Read the weight of the balance loss."""
    return {"coef": hf.number("router_aux_loss_coef", default=0.001), "convention": "hf"}


def moe_layer_values(layers: Sequence[int], num_layers: int) -> dict[str, Any]:
    """Return the keys of `model.moe` for a pattern of MoE layers."""
    layers = list(layers)
    if not layers:
        raise ForeignConfigError("no layer has experts; a dense model is not supported")
    if layers == list(range(layers[0], num_layers)):
        return {"first_dense_layers": layers[0]}
    for every in range(2, num_layers):
        if layers == [i for i in range(num_layers) if (i + 1) % every == 0]:
            return {"every": every}
    return {"layers": layers}
