"""Tiny published models of every family, made and saved by transformers itself."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from trainer.data.tokenizers.byte import ByteTokenizer

_SIZES: dict[str, Any] = {
    **{"vocab_size": 256, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "max_position_embeddings": 64, "num_experts_per_tok": 2, "sliding_window": None},
    **{"initializer_range": 0.2, "eos_token_id": 255},
}
_DEEPSEEK: dict[str, Any] = {
    **{"kv_lora_rank": 12, "q_lora_rank": 8, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5},
    **{"n_routed_experts": 8, "n_shared_experts": 1, "intermediate_size": 20, "moe_intermediate_size": 12},
    **{"first_k_dense_replace": 1, "n_group": 4, "topk_group": 2, "num_key_value_heads": 4},
}
_DENSE: dict[str, Any] = {"intermediate_size": 20, "num_experts_per_tok": None}
_LLAMA3: dict[str, Any] = {
    **{"rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16},
    **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 6, "intermediate_size": 12, "head_dim": 4},
    "qwen2_moe": {
        "num_experts": 6,
        "moe_intermediate_size": 12,
        "shared_expert_intermediate_size": 8,
        "qkv_bias": False,
    },
    "qwen3_moe": {"num_experts": 6, "moe_intermediate_size": 12, "head_dim": 6, "norm_topk_prob": True},
    "olmoe": {"num_experts": 6, "intermediate_size": 12},
    "deepseek_v2": {**_DEEPSEEK, "topk_method": "group_limited_greedy"},
    "deepseek_v3": _DEEPSEEK,
    "glm4_moe": {
        **{"n_routed_experts": 8, "n_shared_experts": 1, "intermediate_size": 20, "moe_intermediate_size": 12},
        **{"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "head_dim": 8, "use_qk_norm": True},
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5},
    },
    "dots1": {
        **{"n_routed_experts": 8, "n_shared_experts": 2, "intermediate_size": 20, "moe_intermediate_size": 12},
        **{"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "head_dim": 6},
    },
    "llama": {"attention_bias": True, "rope_parameters": _LLAMA3, **_DENSE},
    "mistral": {"head_dim": 6, "sliding_window": 8, **_DENSE},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1, **_DENSE},
    "qwen3": {"head_dim": 6, "tie_word_embeddings": True, **_DENSE},
    "gpt_oss": {"num_local_experts": 6, "intermediate_size": 12, "head_dim": 8, "sliding_window": 8},
}
"""Sizes of each family, by transformers' model_type."""


def make_foreign(family: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **values: Any) -> nn.Module:
    """Return a model with random weights, norms and biases included."""
    config = AutoConfig.for_model(family, **{**_SIZES, **FAMILIES[family], **values})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.dim() == 1 and not name.endswith("inv_freq"):
            tensor.data.add_(0.1 * torch.randn(tensor.shape, generator=generator).to(tensor.dtype))
    return model


def save_foreign(folder: Path, model: nn.Module, *, with_tokenizer: bool = True, **options: Any) -> Path:
    """Save a model as it is published, with the byte tokenizer, which has 256 ids."""
    logging.disable_progress_bar()
    model.save_pretrained(folder, **options)  # type: ignore[operator]
    for name, text in ByteTokenizer().files().items() if with_tokenizer else ():
        (folder / name).write_text(text)
    return folder


def change_json(path: Path, **values: Any) -> None:
    """Change keys of a JSON file; None removes one."""
    content = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
