"""Llama 2 and 3 (arXiv 2307.09288, 2407.21783): dense, with or without biases in attention. Imports no torch."""

from collections.abc import Iterator
from typing import Any

from trainer.config.base import Problem
from trainer.families.base import Family
from trainer.families.decoder_keys import dense_from_hf, dense_to_hf, with_biases
from trainer.families.decoder_links import decoder_links
from trainer.families.hf_config import HFConfig
from trainer.families.link import Link
from trainer.models.config import ModelConfig


class Llama(Family):
    """Llama."""

    name = "llama"
    architecture = "LlamaForCausalLM"
    is_dense = True

    def config_values(self, model: ModelConfig) -> dict[str, Any]:
        """Return their config without its head."""
        return dense_to_hf(model) | {"attention_bias": model.attention.qkv_bias, "mlp_bias": False}

    def model_values(self, hf: HFConfig) -> dict[str, Any]:
        """Read their config."""
        hf.expect("mlp_bias", False)
        return with_biases(hf, dense_from_hf(hf))

    def links(self, model: ModelConfig, vocab_size: int) -> Iterator[Link]:
        """Yield a link for every tensor of theirs."""
        return decoder_links(model, vocab_size)

    def limits(self, model: ModelConfig) -> Iterator[Problem]:
        """Yield what transformers refuses, whatever the width of a head."""
        if model.d_model % model.num_heads:
            what = f"{model.num_heads} does not divide d_model {model.d_model}, as it does in {self.name}"
            yield Problem("num_heads", what)
