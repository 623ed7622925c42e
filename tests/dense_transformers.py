"""Dense models of Hugging Face transformers, for tests/transformers_models.py."""

from typing import Any

from torch import nn
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM
from transformers.models.mistral.configuration_mistral import MistralConfig
from transformers.models.mistral.modeling_mistral import MistralForCausalLM
from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2ForCausalLM
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3ForCausalLM

from trainer.models.config import ModelConfig


def dense(family: str, common: dict[str, Any], config: ModelConfig, layer_types: list[str]) -> nn.Module:
    """Return their model of the same config; `common` are the keys that all families have."""
    values: dict[str, Any] = {**common, "intermediate_size": config.d_ff}
    windows: dict[str, Any] = {"use_sliding_window": any(config.windows), "layer_types": layer_types}
    match family:
        case "llama":
            return LlamaForCausalLM(LlamaConfig(**values))
        case "mistral":
            return MistralForCausalLM(MistralConfig(**values))
        case "qwen2":
            return Qwen2ForCausalLM(Qwen2Config(**values, **windows))
        case _:
            return Qwen3ForCausalLM(Qwen3Config(**values, **windows))
