"""The config.json of published dense models, and their sizes; left out is what is left out of the others."""

from decimal import ROUND_HALF_UP
from typing import Any

from tests.published_models import PublishedModel

_COMMON: dict[str, Any] = {"attention_dropout": 0.0, "hidden_act": "silu", "initializer_range": 0.02}

LLAMA_3_2_1B = PublishedModel(
    config={
        **_COMMON,
        "model_type": "llama",
        "attention_bias": False,
        "head_dim": 64,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "num_attention_heads": 32,
        "num_hidden_layers": 16,
        "num_key_value_heads": 8,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "vocab_size": 128256,
    },
    parameters=1_235_814_400,
    stated="1.23",
    source="model card",
)
MISTRAL_7B = PublishedModel(
    config={
        **_COMMON,
        "model_type": "mistral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "vocab_size": 32000,
    },
    parameters=7_241_732_096,
    stated="7",
    source="arXiv 2310.06825",
)
QWEN2_5_500M = PublishedModel(
    config={
        **_COMMON,
        "model_type": "qwen2",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "max_position_embeddings": 32768,
        "max_window_layers": 24,
        "num_attention_heads": 14,
        "num_hidden_layers": 24,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    parameters=494_032_768,
    stated="0.49",
    source="model card",
)
QWEN3_600M = PublishedModel(
    config={
        **_COMMON,
        "model_type": "qwen3",
        "attention_bias": False,
        "head_dim": 128,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "max_position_embeddings": 40960,
        "max_window_layers": 28,
        "num_attention_heads": 16,
        "num_hidden_layers": 28,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    parameters=596_049_920,
    stated="0.6",
    source="model card",
    rounding=ROUND_HALF_UP,
)
PUBLISHED_DENSE = {
    "Llama-3.2-1B": LLAMA_3_2_1B,
    "Mistral-7B-v0.1": MISTRAL_7B,
    "Qwen2.5-0.5B": QWEN2_5_500M,
    "Qwen3-0.6B": QWEN3_600M,
}
