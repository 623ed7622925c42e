"""Qwen2-MoE (arXiv 2407.10671, Qwen1.5-MoE): a gated shared expert of its own width. Imports no torch."""

from collections.abc import Iterator
from types import MappingProxyType
from typing import Any

from trainer.config.base import Problem
from trainer.families.base import Family
from trainer.families.decoder_keys import grouped_from_hf, grouped_to_hf
from trainer.families.decoder_links import decoder_links
from trainer.families.hf_config import HFConfig
from trainer.families.link import Link
from trainer.families.qwen_moe_keys import qwen_moe_to_hf, qwen_moe_values
from trainer.families.window_keys import window_of_layers, window_to_hf
from trainer.models.config import ModelConfig


class Qwen2MoE(Family):
    """Qwen2-MoE."""

    name = "qwen2_moe"
    architecture = "Qwen2MoeForCausalLM"
    defaults = MappingProxyType({"num_key_value_heads": 16, "sliding_window": 4096})

    def config_values(self, model: ModelConfig) -> dict[str, Any]:
        """Return their config without its head."""
        assert model.moe is not None, "refused before its config is written"
        return {
            **grouped_to_hf(model),
            **qwen_moe_to_hf(model),
            "shared_expert_intermediate_size": model.moe.shared_width,
            "qkv_bias": model.attention.qkv_bias,
            **window_to_hf(model),
            "use_sliding_window": model.attention.window is not None,
            "max_window_layers": model.num_layers,
        }

    def model_values(self, hf: HFConfig) -> dict[str, Any]:
        """Read their config."""
        shared = grouped_from_hf(hf)
        if hf.boolean("qkv_bias", default=True):
            shared["attention"]["qkv_bias"] = True
        shared["attention"] |= self._windows(hf, shared["num_layers"])
        dense, moe = qwen_moe_values(hf, shared["num_layers"])
        width = hf.integer("shared_expert_intermediate_size")
        if width:  # 0 is refused, by its tensors; read, so that all keys that are in an export's way are named
            moe |= {"num_shared_experts": 1, "shared_d_ff": width, "shared_gate": True}
        return {**shared, **dense, "moe": moe}

    def _windows(self, hf: HFConfig, num_layers: int) -> dict[str, Any]:
        """Read their windows; without `layer_types` every second layer has one, of those below `max_window_layers`."""
        kinds, last = hf.optional("layer_types"), hf.integer("max_window_layers", default=28)
        if not hf.boolean("use_sliding_window", default=False):
            hf.optional("sliding_window")
            return {}
        default = ["sliding_attention" if i % 2 == 0 and i < last else "full_attention" for i in range(num_layers)]
        return window_of_layers(hf, default if kinds is None else kinds)

    def links(self, model: ModelConfig, vocab_size: int) -> Iterator[Link]:
        """Yield a link for every tensor of theirs."""
        return decoder_links(model, vocab_size, shared="shared_expert")

    def limits(self, model: ModelConfig) -> Iterator[Problem]:
        """Yield what their config cannot say."""
        if model.moe is not None and model.moe.num_shared_experts == 0:
            yield Problem("moe.num_shared_experts", f"0: {self.name} has 1")
