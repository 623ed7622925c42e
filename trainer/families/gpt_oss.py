"""GPT-OSS (arXiv 2508.10925): sinks, windows, clamped SwiGLU, biases everywhere. Imports no torch.

# E experts, D d_model, F hidden width of one.
"""

from collections.abc import Iterator
from types import MappingProxyType
from typing import Any, Final

from trainer.families.base import Family
from trainer.families.decoder_keys import balance_from_hf, balance_to_hf, grouped_from_hf, grouped_to_hf
from trainer.families.decoder_links import attention_links, norm_links, outer_links
from trainer.families.hf_config import HFConfig
from trainer.families.link import Interleaved, Link
from trainer.families.routing_form import required_form
from trainer.families.window_keys import window_of_layers, window_to_hf
from trainer.models.config import ModelConfig

_DEFAULT_ROPE: Final = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
"""Scaling of a config that says nothing of it."""


class GptOss(Family):
    """GPT-OSS."""

    name = "gpt_oss"
    architecture = "GptOssForCausalLM"
    defaults = MappingProxyType({"head_dim": 64, "num_key_value_heads": 8, "sliding_window": 128})

    def config_values(self, model: ModelConfig) -> dict[str, Any]:
        """Return their config without its head."""
        assert model.moe is not None, "refused before its config is written"
        values = grouped_to_hf(model)
        values["rope_scaling"] = values["rope_scaling"] or {"rope_type": "default", "type": "default"}
        return {
            **values,
            **balance_to_hf(model),
            **window_to_hf(model),
            "attention_bias": model.attention.qkv_bias,
            "intermediate_size": model.moe.d_ff,
            "num_local_experts": model.moe.num_experts,
            "num_experts_per_tok": required_form(model.moe).top_k,
            "experts_per_token": required_form(model.moe).top_k,
            "swiglu_alpha": model.swiglu_alpha,
            "swiglu_limit": model.swiglu_limit,
        }

    def model_values(self, hf: HFConfig) -> dict[str, Any]:
        """Read their config."""
        if hf.optional("rope_parameters") is None and hf.optional("rope_scaling") is None:
            hf.values = {**hf.values, "rope_scaling": _DEFAULT_ROPE}
        values, top_k = grouped_from_hf(hf, default_theta=150000.0), hf.integer("num_experts_per_tok", default=4)
        hf.expect("experts_per_token", top_k)
        hf.optional("initial_context_length")  # of the older program; transformers reads that of the scaling
        bias = hf.boolean("attention_bias", default=True)
        kinds = [("full_attention", "sliding_attention")[layer % 2 == 0] for layer in range(values["num_layers"])]
        windows = window_of_layers(hf, hf.optional("layer_types") or kinds)
        values["attention"] |= {"sinks": True, "qkv_bias": bias, "out_bias": bias, **windows}
        moe = {
            "num_experts": hf.integer("num_local_experts", "num_experts"),
            "d_ff": hf.integer("intermediate_size"),
            "expert_bias": True,
            "router": {"kind": "top_k", "top_k": top_k, "gate_bias": True},
            "balance": balance_from_hf(hf),
        }
        numbers = {
            "swiglu_alpha": hf.number("swiglu_alpha", default=1.702),
            "swiglu_limit": hf.number("swiglu_limit", default=7.0),
        }
        return {**values, "activation": "clamped_swiglu", **numbers, "moe": moe}

    def links(self, model: ModelConfig, vocab_size: int) -> Iterator[Link]:
        """Yield a link for every tensor of theirs."""
        yield from outer_links(model, vocab_size)
        for layer in range(model.num_layers):
            theirs, ours = f"model.layers.{layer}.self_attn.sinks", f"blocks.{layer}.attention.sinks"
            yield from norm_links(model, layer)
            yield from attention_links(model, layer)
            yield Link(theirs=theirs, shape=(model.num_heads,), ours=ours)
            yield from _expert_links(model, layer)


def _expert_links(model: ModelConfig, layer: int) -> Iterator[Link]:
    """Link a router and its experts, which are stacked and transposed there, rows of gate and up alternating."""
    assert model.moe is not None, "refused before its links are asked for"
    theirs, ours = f"model.layers.{layer}.mlp", f"blocks.{layer}.ffn"
    E, D, F = model.moe.num_experts, model.d_model, model.moe.d_ff
    both = Interleaved(dim=1, block=2 * F, within=(0, 2 * F))
    for kind, shape in (("weight", (E, D)), ("bias", (E,))):
        yield Link(theirs=f"{theirs}.router.{kind}", shape=shape, ours=f"{ours}.router.gate.{kind}")
    theirs, ours = f"{theirs}.experts", f"{ours}.experts"
    yield Link(
        theirs=f"{theirs}.gate_up_proj", shape=(E, D, 2 * F), ours=f"{ours}.w_in", interleaved=both, transposed=True
    )
    yield Link(theirs=f"{theirs}.gate_up_proj_bias", shape=(E, 2 * F), ours=f"{ours}.w_in_bias", interleaved=both)
    yield Link(theirs=f"{theirs}.down_proj", shape=(E, F, D), ours=f"{ours}.w_out", transposed=True)
    yield Link(theirs=f"{theirs}.down_proj_bias", shape=(E, D), ours=f"{ours}.w_out_bias")
