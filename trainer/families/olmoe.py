"""OLMoE (arXiv 2409.02060): MoE in every layer, norms over all heads of queries and keys. Imports no torch."""

from collections.abc import Iterator
from types import MappingProxyType
from typing import Any

from trainer.families.base import Family
from trainer.families.decoder_keys import (
    balance_from_hf,
    balance_to_hf,
    grouped_from_hf,
    grouped_to_hf,
    softmax_router_from_hf,
    with_biases,
)
from trainer.families.decoder_links import decoder_links
from trainer.families.hf_config import HFConfig
from trainer.families.link import Link
from trainer.families.routing_form import required_form
from trainer.models.config import ModelConfig


class Olmoe(Family):
    """OLMoE."""

    name = "olmoe"
    architecture = "OlmoeForCausalLM"
    defaults = MappingProxyType({"router_aux_loss_coef": 0.01})

    def config_values(self, model: ModelConfig) -> dict[str, Any]:
        """Return their config without its head."""
        assert model.moe is not None, "refused before its config is written"
        form = required_form(model.moe)
        values = {
            **grouped_to_hf(model),
            **balance_to_hf(model),
            "intermediate_size": model.moe.d_ff,
            "num_experts": model.moe.num_experts,
            "num_experts_per_tok": form.top_k,
            "norm_topk_prob": form.normalize,
            "attention_bias": model.attention.qkv_bias,
            "clip_qkv": model.attention.clip_qkv,
        }
        if model.head_dim * model.num_heads == model.d_model:
            del values["head_dim"]  # no published model has it
        return values

    def model_values(self, hf: HFConfig) -> dict[str, Any]:
        """Read their config."""
        values = with_biases(hf, grouped_from_hf(hf))
        values["attention"]["qk_norm_over"] = "all_heads"
        if hf.optional("clip_qkv") is not None:
            values["attention"]["clip_qkv"] = hf.number("clip_qkv")
        moe = {
            "num_experts": hf.integer("num_experts", "num_local_experts"),
            "d_ff": hf.integer("intermediate_size"),
            "router": softmax_router_from_hf(hf),
            "balance": balance_from_hf(hf),
        }
        return {**values, "qk_norm": True, "moe": moe}

    def links(self, model: ModelConfig, vocab_size: int) -> Iterator[Link]:
        """Yield a link for every tensor of theirs."""
        return decoder_links(model, vocab_size)
