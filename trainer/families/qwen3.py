"""Qwen3 (arXiv 2505.09388): a dense decoder with norms of query and key heads. Imports no torch."""

from collections.abc import Iterator
from types import MappingProxyType
from typing import Any

from trainer.families.base import Family
from trainer.families.decoder_keys import dense_from_hf, dense_to_hf, with_biases
from trainer.families.decoder_links import decoder_links
from trainer.families.hf_config import HFConfig
from trainer.families.link import Link
from trainer.families.window_keys import qwen_windows, qwen_windows_to_hf
from trainer.models.config import ModelConfig


class Qwen3(Family):
    """Qwen3."""

    name = "qwen3"
    architecture = "Qwen3ForCausalLM"
    defaults = MappingProxyType({"head_dim": 128, "num_key_value_heads": 32, "sliding_window": 4096})
    is_dense = True

    def config_values(self, model: ModelConfig) -> dict[str, Any]:
        """Return their config without its head."""
        return dense_to_hf(model) | qwen_windows_to_hf(model) | {"attention_bias": model.attention.qkv_bias}

    def model_values(self, hf: HFConfig) -> dict[str, Any]:
        """Read their config."""
        values = with_biases(hf, dense_from_hf(hf))
        values["attention"] |= qwen_windows(hf, values["num_layers"])
        return values | {"qk_norm": True}

    def links(self, model: ModelConfig, vocab_size: int) -> Iterator[Link]:
        """Yield a link for every tensor of theirs."""
        return decoder_links(model, vocab_size)
