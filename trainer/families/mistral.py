"""Mistral (arXiv 2310.06825): a dense decoder with one window for all layers. Imports no torch."""

from collections.abc import Iterator
from types import MappingProxyType
from typing import Any

from trainer.families.base import Family
from trainer.families.decoder_keys import dense_from_hf, dense_to_hf
from trainer.families.decoder_links import decoder_links
from trainer.families.hf_config import HFConfig
from trainer.families.link import Link
from trainer.families.window_keys import window_of_all, window_values
from trainer.models.config import ModelConfig


class Mistral(Family):
    """Mistral."""

    name = "mistral"
    architecture = "MistralForCausalLM"
    defaults = MappingProxyType({"num_key_value_heads": 8, "sliding_window": 4096})
    is_dense = True

    def config_values(self, model: ModelConfig) -> dict[str, Any]:
        """Return their config without its head."""
        return dense_to_hf(model) | {"sliding_window": window_of_all(model)}

    def model_values(self, hf: HFConfig) -> dict[str, Any]:
        """Read their config."""
        values = dense_from_hf(hf)
        values["attention"] |= window_values(hf.optional("sliding_window"))
        return values

    def links(self, model: ModelConfig, vocab_size: int) -> Iterator[Link]:
        """Yield a link for every tensor of theirs."""
        return decoder_links(model, vocab_size)
