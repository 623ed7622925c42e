"""Keys of multi-head latent attention (DeepSeek-V2 and V3). Imports no torch."""

from collections.abc import Iterator
from typing import Any, Final

from trainer.config.base import Problem
from trainer.families.decoder_keys import shared_from_hf, shared_to_hf, with_biases
from trainer.families.hf_config import HFConfig
from trainer.models.config import ModelConfig

_WIDTHS: Final = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
_NORM_EPS: Final = 1e-6
"""Epsilon of the norms within attention, whatever rms_norm_eps is."""


def latent_to_hf(model: ModelConfig) -> dict[str, Any]:
    """Return the keys of a decoder with latent attention; without, none of its widths."""
    latent = model.attention.latent
    values = shared_to_hf(model) | {"attention_bias": model.attention.qkv_bias}
    if latent is None:  # refused by what is read back
        return values
    return values | {"q_lora_rank": latent.q_lora_rank} | {key: getattr(latent, key) for key in _WIDTHS}


def needs_latent(model: ModelConfig, name: str) -> Iterator[Problem]:
    """Refuse a model with grouped-query attention."""
    if model.attention.latent is None:
        yield Problem("attention.latent", f"null: {name} has latent attention")


def latent_from_hf(hf: HFConfig) -> dict[str, Any]:
    """Read the keys of a decoder with latent attention."""
    values = shared_from_hf(hf)
    latent: dict[str, Any] = {key: hf.integer(key) for key in _WIDTHS}
    latent |= {"q_lora_rank": hf.optional("q_lora_rank"), "norm_eps": _NORM_EPS}
    hf.expect("num_key_value_heads", values["num_heads"])
    hf.expect("head_dim", latent["qk_rope_head_dim"])
    hf.expect("qk_head_dim", latent["qk_nope_head_dim"] + latent["qk_rope_head_dim"])
    hf.expect("mlp_bias", False)
    return with_biases(hf, values | {"attention": {"latent": latent}})
