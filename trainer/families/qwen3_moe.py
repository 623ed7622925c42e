"""Qwen3-MoE (arXiv 2505.09388): norms of query and key heads, no shared experts. Imports no torch."""

from collections.abc import Iterator
from types import MappingProxyType
from typing import Any

from trainer.families.base import Family
from trainer.families.decoder_keys import grouped_from_hf, grouped_to_hf, with_biases
from trainer.families.decoder_links import decoder_links
from trainer.families.hf_config import HFConfig
from trainer.families.link import Link
from trainer.families.qwen_moe_keys import qwen_moe_to_hf, qwen_moe_values
from trainer.families.window_keys import window_of_all, window_values
from trainer.models.config import ModelConfig


class Qwen3MoE(Family):
    """Qwen3-MoE."""

    name = "qwen3_moe"
    architecture = "Qwen3MoeForCausalLM"
    defaults = MappingProxyType({"num_key_value_heads": 4, "sliding_window": 4096})

    def config_values(self, model: ModelConfig) -> dict[str, Any]:
        """Return their config without its head."""
        window = window_of_all(model)
        return {
            **grouped_to_hf(model),
            **qwen_moe_to_hf(model),
            "use_sliding_window": window is not None,
            "sliding_window": window,
            "max_window_layers": 0 if window is not None else model.num_layers,
            "attention_bias": model.attention.qkv_bias,
        }

    def model_values(self, hf: HFConfig) -> dict[str, Any]:
        """Read their config."""
        shared = with_biases(hf, grouped_from_hf(hf))
        window = hf.optional("sliding_window")
        if hf.boolean("use_sliding_window", default=False):
            shared["attention"] |= window_values(window)
        dense, moe = qwen_moe_values(hf, shared["num_layers"])
        return {**shared, **dense, "qk_norm": True, "moe": moe}

    def links(self, model: ModelConfig, vocab_size: int) -> Iterator[Link]:
        """Yield a link for every tensor of theirs."""
        return decoder_links(model, vocab_size)
