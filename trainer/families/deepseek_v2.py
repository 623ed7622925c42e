"""DeepSeek-V2 (arXiv 2405.04434): latent attention, softmax routing, with groups or without. Imports no torch."""

from collections.abc import Iterator
from types import MappingProxyType
from typing import Any

from trainer.config.base import Problem
from trainer.families.base import Family
from trainer.families.decoder_keys import moe_layer_values
from trainer.families.decoder_links import decoder_links
from trainer.families.hf_config import HFConfig
from trainer.families.latent_keys import latent_from_hf, latent_to_hf, needs_latent
from trainer.families.link import Link
from trainer.families.routing_form import required_form
from trainer.families.sigmoid_moe import needs_shared_experts, sigmoid_moe_keys
from trainer.models.config import ModelConfig


class DeepseekV2(Family):
    """DeepSeek-V2 and V2-Lite."""

    name = "deepseek_v2"
    architecture = "DeepseekV2ForCausalLM"
    defaults = MappingProxyType({"q_lora_rank": 1536, "n_shared_experts": 2})

    def config_values(self, model: ModelConfig) -> dict[str, Any]:
        """Return their config without its head."""
        assert model.moe is not None, "refused before its config is written"
        is_limited = required_form(model.moe).kind == "group_limited"
        routing = {
            "scoring_func": "softmax",
            "topk_method": "group_limited_greedy" if is_limited else "greedy",
            "norm_topk_prob": False,
            "moe_layer_freq": 1,
        }
        return {**latent_to_hf(model), **sigmoid_moe_keys(model), **routing}

    def model_values(self, hf: HFConfig) -> dict[str, Any]:
        """Read their config; `norm_topk_prob` has no effect in transformers, and true means another model elsewhere."""
        shared = latent_from_hf(hf)
        hf.expect("scoring_func", "softmax")
        hf.expect("topk_method", "greedy", "group_limited_greedy")
        hf.expect("norm_topk_prob", False)
        hf.expect("moe_layer_freq", 1)
        router: dict[str, Any] = {
            "kind": "top_k",
            "score": "softmax",
            "top_k": hf.integer("num_experts_per_tok"),
            "normalize": False,
            "scale": hf.number("routed_scaling_factor", default=1.0),
        }
        groups, kept = hf.integer("n_group", default=1), hf.integer("topk_group", default=1)
        if hf.optional("topk_method") == "group_limited_greedy" and kept < groups:
            router |= {"kind": "group_limited", "groups": groups, "groups_kept": kept, "group_score": "best"}
            router["bias_update_rate"] = 0.0
        num_layers = shared["num_layers"]
        moe = {
            **moe_layer_values(range(hf.integer("first_k_dense_replace", default=0), num_layers), num_layers),
            "num_experts": hf.integer("n_routed_experts"),
            "num_shared_experts": hf.integer("n_shared_experts", default=0),
            "d_ff": hf.integer("moe_intermediate_size"),
            "router": router,
            "balance": {"coef": hf.number("aux_loss_alpha", default=0.0), "scope": "sequence"},
        }
        return {**shared, "d_ff": hf.integer("intermediate_size"), "moe": moe}

    def links(self, model: ModelConfig, vocab_size: int) -> Iterator[Link]:
        """Yield a link for every tensor of theirs."""
        return decoder_links(model, vocab_size, shared="shared_experts")

    def zero_tensors(self, model: ModelConfig) -> Iterator[str]:
        """Yield the selection biases, which our router with groups has and theirs has not."""
        assert model.moe is not None, "refused before its tensors are asked for"
        if required_form(model.moe).has_bias:
            yield from (f"blocks.{layer}.ffn.router.bias" for layer in model.moe_layers)

    def limits(self, model: ModelConfig) -> Iterator[Problem]:
        """Yield what their config cannot say."""
        yield from needs_latent(model, self.name)
        yield from needs_shared_experts(model, self.name)
        rate = getattr(model.moe.router, "bias_update_rate", 0.0) if model.moe is not None else 0.0
        if rate > 0:
            yield Problem("moe.router.bias_update_rate", f"{rate:g}: {self.name} has no selection bias")
