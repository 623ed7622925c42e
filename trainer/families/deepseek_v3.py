"""DeepSeek-V3 (arXiv 2412.19437): latent attention, sigmoid routing with a bias and groups. Imports no torch."""

from collections.abc import Iterator
from types import MappingProxyType
from typing import Any

from trainer.config.base import Problem
from trainer.families.base import Family
from trainer.families.decoder_links import decoder_links
from trainer.families.hf_config import HFConfig
from trainer.families.latent_keys import latent_from_hf, latent_to_hf, needs_latent
from trainer.families.link import Link
from trainer.families.sigmoid_moe import (
    needs_shared_experts,
    needs_two_experts_a_group,
    sigmoid_moe_keys,
    sigmoid_moe_values,
)
from trainer.models.config import ModelConfig


class DeepseekV3(Family):
    """DeepSeek-V3, without its module that predicts further tokens."""

    name = "deepseek_v3"
    architecture = "DeepseekV3ForCausalLM"
    defaults = MappingProxyType(
        {
            **{"q_lora_rank": 1536, "n_shared_experts": 1, "first_k_dense_replace": 3},
            **{"n_group": 8, "topk_group": 4, "norm_topk_prob": True, "routed_scaling_factor": 2.5},
        }
    )

    def config_values(self, model: ModelConfig) -> dict[str, Any]:
        """Return their config without its head."""
        more = {"rope_interleave": True, "moe_layer_freq": 1, "num_nextn_predict_layers": 0}
        return {**latent_to_hf(model), **sigmoid_moe_keys(model), **more}

    def model_values(self, hf: HFConfig) -> dict[str, Any]:
        """Read their config."""
        hf.expect("rope_interleave", True)
        shared = latent_from_hf(hf)
        dense, moe = sigmoid_moe_values(hf, shared["num_layers"])
        return {**shared, **dense, "moe": moe}

    def links(self, model: ModelConfig, vocab_size: int) -> Iterator[Link]:
        """Yield a link for every tensor of theirs."""
        return decoder_links(model, vocab_size, has_bias=True, shared="shared_experts")

    def limits(self, model: ModelConfig) -> Iterator[Problem]:
        """Yield what their config cannot say."""
        yield from needs_latent(model, self.name)
        yield from needs_shared_experts(model, self.name)
        yield from needs_two_experts_a_group(model, self.name)
