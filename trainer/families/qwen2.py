"""Qwen2 and 2.5 (arXiv 2407.10671, 2412.15115): dense, with biases of queries, keys and values. Imports no torch."""

from collections.abc import Iterator
from types import MappingProxyType
from typing import Any

from trainer.families.base import Family
from trainer.families.decoder_keys import dense_from_hf, dense_to_hf
from trainer.families.decoder_links import decoder_links
from trainer.families.hf_config import HFConfig
from trainer.families.link import Link
from trainer.families.window_keys import qwen_windows, qwen_windows_to_hf
from trainer.models.config import ModelConfig


class Qwen2(Family):
    """Qwen2."""

    name = "qwen2"
    architecture = "Qwen2ForCausalLM"
    defaults = MappingProxyType({"num_key_value_heads": 32, "sliding_window": 4096})
    is_dense = True
    has_own_splitting = True

    def config_values(self, model: ModelConfig) -> dict[str, Any]:
        """Return their config without its head."""
        values = dense_to_hf(model) | qwen_windows_to_hf(model)
        if model.head_dim * model.num_heads == model.d_model:
            del values["head_dim"]  # no published model has it
        return values

    def model_values(self, hf: HFConfig) -> dict[str, Any]:
        """Read their config."""
        values = dense_from_hf(hf)
        values["attention"] |= {"qkv_bias": True, **qwen_windows(hf, values["num_layers"])}
        return values

    def links(self, model: ModelConfig, vocab_size: int) -> Iterator[Link]:
        """Yield a link for every tensor of theirs."""
        return decoder_links(model, vocab_size)
