"""GPT-OSS and MiniMax-M2 of Hugging Face transformers, for tests/transformers_models.py.

# E experts, D d_model, F d_ff.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.gpt_oss.configuration_gpt_oss import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssForCausalLM
from transformers.models.minimax_m2.configuration_minimax_m2 import MiniMaxM2Config
from transformers.models.minimax_m2.modeling_minimax_m2 import MiniMaxM2ForCausalLM

from trainer.models.config import ModelConfig

GPT_OSS = {
    "attention.sinks": ["self_attn.sinks"],
    "ffn.router.gate.weight": ["mlp.router.weight"],
    "ffn.router.gate.bias": ["mlp.router.bias"],
    "ffn.experts.w_in_bias": ["mlp.experts.gate_up_proj_bias"],
    "ffn.experts.w_out_bias": ["mlp.experts.down_proj_bias"],
}
MINIMAX_M2 = {"ffn.router.bias": ["mlp.e_score_correction_bias"]}
_FEWER_TOKENS: dict[str, Any] = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}


def gpt_oss(common: dict[str, Any], config: ModelConfig, layer_types: list[str]) -> nn.Module:
    """Return their model of the same config."""
    moe = config.moe
    assert moe is not None
    own: dict[str, Any] = {
        "num_local_experts": moe.num_experts,
        "intermediate_size": moe.d_ff,
        "layer_types": layer_types,
    }
    activation: dict[str, Any] = {"swiglu_alpha": config.swiglu_alpha, "swiglu_limit": config.swiglu_limit}
    return GptOssForCausalLM(GptOssConfig(**{**common, **own, **activation, **_FEWER_TOKENS}))


def minimax_m2(common: dict[str, Any], config: ModelConfig) -> nn.Module:
    """Return their model of the same config."""
    moe = config.moe
    assert moe is not None
    own: dict[str, Any] = {"num_local_experts": moe.num_experts, "intermediate_size": moe.d_ff}
    return MiniMaxM2ForCausalLM(MiniMaxM2Config(**{**common, **own, **_FEWER_TOKENS}))


def in_layout_of_gpt_oss(part: str, tensor: Tensor) -> Tensor:
    """Return a tensor of experts as theirs: transposed, the gate and up of each hidden value side by side.

    #  ours (E, 2 F, D): gate 0, gate 1, up 0, up 1     theirs (E, D, 2 F): gate 0, up 0, gate 1, up 1
    """
    if part.startswith("w_in"):
        tensor = torch.stack(tensor.chunk(2, dim=1), dim=2).flatten(1, 2)
    return tensor.mT if tensor.dim() == 3 else tensor
