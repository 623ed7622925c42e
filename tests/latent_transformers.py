"""DeepSeek-V2 and V3 of Hugging Face transformers, and the names of latent attention's weights there.

They rotate neighbours (2i, 2i + 1) where our layout has halves (i, i + r/2): rows of the rotated parts change places.

# H heads; widths of a head: n without and r with rotary positions.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.deepseek_v2.configuration_deepseek_v2 import DeepseekV2Config
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2ForCausalLM
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3ForCausalLM

from trainer.models.config import ModelConfig

_NAMES = {
    "q_norm.weight": "q_a_layernorm.weight",
    "q_b.weight": "q_b_proj.weight",
    "kv_norm.weight": "kv_a_layernorm.weight",
    "kv_b.weight": "kv_b_proj.weight",
    "out.weight": "o_proj.weight",
    "out.bias": "o_proj.bias",
}


def deepseek(family: str, common: dict[str, Any], config: ModelConfig) -> nn.Module:
    """Return the transformers model of the same config; `common` are the keys that all families have."""
    moe, latent = config.moe, config.attention.latent
    assert moe is not None and latent is not None
    router: Any = moe.router
    values = common | {
        "num_key_value_heads": config.num_heads,
        "n_routed_experts": moe.num_experts,
        "n_shared_experts": moe.num_shared_experts,
        "intermediate_size": config.d_ff,
        "moe_intermediate_size": moe.d_ff,
        "first_k_dense_replace": moe.first_dense_layers,
        "routed_scaling_factor": router.scale,
        "q_lora_rank": latent.q_lora_rank,
        "kv_lora_rank": latent.kv_lora_rank,
        "qk_nope_head_dim": latent.qk_nope_head_dim,
        "qk_rope_head_dim": latent.qk_rope_head_dim,
        "v_head_dim": latent.v_head_dim,
    }
    assert config.attention.qkv_bias == config.attention.out_bias, "they have both or neither"
    del values["head_dim"]
    if family == "deepseek_v2":
        assert not router.normalize
        return DeepseekV2ForCausalLM(DeepseekV2Config(**values))
    grouped = {"n_group": router.groups, "topk_group": router.groups_kept, "norm_topk_prob": router.normalize}
    return DeepseekV3ForCausalLM(DeepseekV3Config(**values, **grouped))


def latent_in_their_names(part: str, tensor: Tensor, config: ModelConfig) -> dict[str, Tensor]:
    """Return a tensor of our latent attention, named `part` in it, under its name in theirs."""
    latent = config.attention.latent
    assert latent is not None
    n, r = latent.qk_nope_head_dim, latent.qk_rope_head_dim

    def of_heads(queries: Tensor) -> Tensor:
        return _neighbours(queries.unflatten(0, (config.num_heads, n + r)), width=r, dim=1).flatten(0, 1)

    kind = part.rpartition(".")[2]
    if part.startswith("qkv_a."):
        queries, keys = tensor.tensor_split([len(tensor) - latent.cached_values])
        keys = {f"kv_a_proj_with_mqa.{kind}": _neighbours(keys, width=r, dim=0)}
        is_whole = latent.q_lora_rank is None
        return keys | ({"q_proj.weight": of_heads(queries)} if is_whole else {f"q_a_proj.{kind}": queries})
    return {_NAMES[part]: of_heads(tensor) if part == "q_b.weight" else tensor}


def _neighbours(x: Tensor, *, width: int, dim: int) -> Tensor:
    """Return x with its last `width` entries of a dimension paired as neighbours instead of halves."""
    rest, rotated = x.tensor_split([x.shape[dim] - width], dim=dim)
    pairs = rotated.unflatten(dim, (2, width // 2)).transpose(dim, dim + 1).flatten(dim, dim + 1)
    return torch.cat([rest, pairs], dim=dim)
