"""GLM-4-MoE (GLM-4.5, arXiv 2508.06471): dots.llm1's layers, with norms of heads or without. Imports no torch."""

from collections.abc import Iterator
from types import MappingProxyType
from typing import Any

from trainer.config.base import Problem
from trainer.families.base import Family
from trainer.families.decoder_keys import grouped_from_hf, grouped_to_hf
from trainer.families.decoder_links import decoder_links
from trainer.families.hf_config import HFConfig
from trainer.families.link import Link
from trainer.families.sigmoid_moe import (
    needs_shared_experts,
    needs_two_experts_a_group,
    sigmoid_moe_keys,
    sigmoid_moe_values,
)
from trainer.models.config import ModelConfig


class Glm4MoE(Family):
    """GLM-4-MoE."""

    name = "glm4_moe"
    architecture = "Glm4MoeForCausalLM"
    defaults = MappingProxyType(
        {"num_key_value_heads": 8, "first_k_dense_replace": 1, "n_shared_experts": 1, "norm_topk_prob": True}
    )

    def config_values(self, model: ModelConfig) -> dict[str, Any]:
        """Return their config without its head."""
        return {
            **grouped_to_hf(model),
            **sigmoid_moe_keys(model),
            "attention_bias": model.attention.qkv_bias,
            "use_qk_norm": model.qk_norm,
            "partial_rotary_factor": model.attention.rotary_fraction,
            "num_nextn_predict_layers": 0,
        }

    def model_values(self, hf: HFConfig) -> dict[str, Any]:
        """Read their config."""
        if hf.optional("partial_rotary_factor") is None:
            hf.values = {**hf.values, "partial_rotary_factor": 0.5}  # their default, unless rope_parameters has one
        shared = grouped_from_hf(hf, has_fraction=True)
        if hf.boolean("attention_bias", default=False):
            shared["attention"]["qkv_bias"] = True
        dense, moe = sigmoid_moe_values(hf, shared["num_layers"])
        return {**shared, **dense, "qk_norm": hf.boolean("use_qk_norm", default=False), "moe": moe}

    def links(self, model: ModelConfig, vocab_size: int) -> Iterator[Link]:
        """Yield a link for every tensor of theirs."""
        return decoder_links(model, vocab_size, has_bias=True, shared="shared_experts")

    def limits(self, model: ModelConfig) -> Iterator[Problem]:
        """Yield what their config cannot say."""
        yield from needs_shared_experts(model, self.name)
        yield from needs_two_experts_a_group(model, self.name)
