"""dots.llm1 (arXiv 2506.05767): sigmoid routing with a bias, shared experts, norms of heads. Imports no torch."""

from collections.abc import Iterator
from types import MappingProxyType
from typing import Any

from trainer.config.base import Problem
from trainer.families.base import Family
from trainer.families.decoder_keys import grouped_from_hf, grouped_to_hf, with_biases
from trainer.families.decoder_links import decoder_links
from trainer.families.hf_config import HFConfig
from trainer.families.link import Link
from trainer.families.sigmoid_moe import (
    needs_shared_experts,
    needs_two_experts_a_group,
    sigmoid_moe_keys,
    sigmoid_moe_values,
)
from trainer.families.window_keys import late_windows, window_to_hf
from trainer.models.config import ModelConfig


class Dots1(Family):
    """dots.llm1."""

    name = "dots1"
    architecture = "Dots1ForCausalLM"
    defaults = MappingProxyType({"num_key_value_heads": 32, "sliding_window": 4096})

    def config_values(self, model: ModelConfig) -> dict[str, Any]:
        """Return their config without its head."""
        return {
            **grouped_to_hf(model),
            **sigmoid_moe_keys(model),
            "attention_bias": model.attention.qkv_bias,
            **window_to_hf(model),
            "max_window_layers": model.num_layers,
        }

    def model_values(self, hf: HFConfig) -> dict[str, Any]:
        """Read their config."""
        shared = with_biases(hf, grouped_from_hf(hf))
        shared["attention"] |= late_windows(hf, shared["num_layers"], default_first=62)
        dense, moe = sigmoid_moe_values(hf, shared["num_layers"])
        return {**shared, **dense, "qk_norm": True, "moe": moe}

    def links(self, model: ModelConfig, vocab_size: int) -> Iterator[Link]:
        """Yield a link for every tensor of theirs."""
        return decoder_links(model, vocab_size, has_bias=True, shared="shared_experts")

    def limits(self, model: ModelConfig) -> Iterator[Problem]:
        """Yield what their config cannot say."""
        yield from needs_shared_experts(model, self.name)
        yield from needs_two_experts_a_group(model, self.name)
