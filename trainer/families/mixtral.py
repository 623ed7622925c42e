"""Mixtral (arXiv 2401.04088): MoE in every layer, softmax over the selected experts. Imports no torch."""

from collections.abc import Iterator
from types import MappingProxyType
from typing import Any

from trainer.families.base import Family
from trainer.families.decoder_keys import balance_from_hf, balance_to_hf, grouped_from_hf, grouped_to_hf
from trainer.families.decoder_links import (
    ExpertNames,
    attention_links,
    expert_links,
    gate_links,
    norm_links,
    outer_links,
)
from trainer.families.hf_config import HFConfig
from trainer.families.link import Link
from trainer.families.routing_form import required_form
from trainer.families.window_keys import window_of_all, window_values
from trainer.models.config import ModelConfig

_NAMES = ExpertNames("w1", "w3", "w2")


class Mixtral(Family):
    """Mixtral."""

    name = "mixtral"
    architecture = "MixtralForCausalLM"
    defaults = MappingProxyType({"num_key_value_heads": 8})

    def config_values(self, model: ModelConfig) -> dict[str, Any]:
        """Return their config without its head."""
        assert model.moe is not None, "refused before its config is written"
        return {
            **grouped_to_hf(model),
            **balance_to_hf(model),
            "intermediate_size": model.moe.d_ff,
            "num_local_experts": model.moe.num_experts,
            "num_experts_per_tok": required_form(model.moe).top_k,
            "sliding_window": window_of_all(model),
        }

    def model_values(self, hf: HFConfig) -> dict[str, Any]:
        """Read their config."""
        values = grouped_from_hf(hf, default_theta=1e6)
        values["attention"] |= window_values(hf.optional("sliding_window"))
        moe = {
            "num_experts": hf.integer("num_local_experts"),
            "d_ff": hf.integer("intermediate_size"),
            "router": {"kind": "top_k", "top_k": hf.integer("num_experts_per_tok"), "normalize": True},
            "balance": balance_from_hf(hf),
        }
        return {**values, "moe": moe}

    def links(self, model: ModelConfig, vocab_size: int) -> Iterator[Link]:
        """Yield a link for every tensor of theirs."""
        yield from outer_links(model, vocab_size)
        for layer in range(model.num_layers):
            theirs = f"model.layers.{layer}.block_sparse_moe"
            yield from norm_links(model, layer)
            yield from attention_links(model, layer)
            yield from gate_links(theirs, layer, model)
            yield from expert_links(theirs, layer, model, _NAMES)
