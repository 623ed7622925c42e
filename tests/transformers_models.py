"""Models of Hugging Face transformers, an external reference for the whole model.

Their code runs as it is installed. It casts to float32 in its norms, rotary tables, routers and softmax, so that in
float64 it agrees with anything to 1e-7 at best; in float64 every such cast is answered with float64 here.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.models.dots1.configuration_dots1 import Dots1Config
from transformers.models.dots1.modeling_dots1 import Dots1ForCausalLM
from transformers.models.glm4_moe.configuration_glm4_moe import Glm4MoeConfig
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeForCausalLM
from transformers.models.mixtral.configuration_mixtral import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralForCausalLM
from transformers.models.olmoe.configuration_olmoe import OlmoeConfig
from transformers.models.olmoe.modeling_olmoe import OlmoeForCausalLM
from transformers.models.qwen2_moe.configuration_qwen2_moe import Qwen2MoeConfig
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeForCausalLM
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeForCausalLM

from tests.dense_transformers import dense
from tests.latent_transformers import deepseek, latent_in_their_names
from tests.more_transformers import GPT_OSS, MINIMAX_M2, gpt_oss, in_layout_of_gpt_oss, minimax_m2
from trainer.models.config import ModelConfig
from trainer.models.gpt import GPT

# B rows, S tokens in a row, V vocabulary.

_WHOLE = {
    "embedding.weight": "model.embed_tokens.weight",
    "head.weight": "lm_head.weight",
    "norm.weight": "model.norm.weight",
}
_IN_A_LAYER = {
    "attention_norm.weight": ["input_layernorm.weight"],
    "attention.qkv.weight": ["self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"],
    "attention.qkv.bias": ["self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"],
    "attention.out.bias": ["self_attn.o_proj.bias"],
    "attention.q_norm.weight": ["self_attn.q_norm.weight"],
    "attention.k_norm.weight": ["self_attn.k_norm.weight"],
    "attention.out.weight": ["self_attn.o_proj.weight"],
    "ffn_norm.weight": ["post_attention_layernorm.weight"],
    "ffn.w_in.weight": ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
    "ffn.w_out.weight": ["mlp.down_proj.weight"],
    "ffn.router.gate.weight": ["mlp.gate.weight"],
    "ffn.router.bias": ["mlp.gate.e_score_correction_bias"],
    "ffn.experts.w_in": ["mlp.experts.gate_up_proj"],
    "ffn.experts.w_out": ["mlp.experts.down_proj"],
    "ffn.shared.w_in.weight": ["mlp.shared_experts.gate_proj.weight", "mlp.shared_experts.up_proj.weight"],
    "ffn.shared.w_out.weight": ["mlp.shared_experts.down_proj.weight"],
}
"""Name of a tensor here, and in transformers the names of its parts, stacked in this order."""
_GATED_SHARED = {
    "ffn.shared.gate.weight": ["mlp.shared_expert_gate.weight"],
    "ffn.shared.w_in.weight": ["mlp.shared_expert.gate_proj.weight", "mlp.shared_expert.up_proj.weight"],
    "ffn.shared.w_out.weight": ["mlp.shared_expert.down_proj.weight"],
}
"""Qwen2-MoE's, whose shared expert alone has a gate."""


class WithoutFloat32(TorchFunctionMode):
    """Replace float32 by float64 in calls to torch within the context."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def wide(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        func = torch.Tensor.double if func is torch.Tensor.float else func
        return func(*map(wide, args), **{name: wide(value) for name, value in (kwargs or {}).items()})


@contextmanager
def _in(dtype: torch.dtype) -> Iterator[None]:
    """Compute in this dtype, quotients of whole numbers included."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with WithoutFloat32() if dtype is torch.float64 else nullcontext():
            yield
    finally:
        torch.set_default_dtype(before)


def build(family: str, ours: GPT) -> nn.Module:
    """Return the transformers model of the same config, with the same weights and dtype."""
    dtype = ours.embedding.weight.dtype
    with _in(dtype):  # rotary frequencies are made here
        theirs = _of(family, ours.config, ours.vocab_size).to(dtype).train()
    _copy_weights(ours, theirs)
    return theirs


def _of(family: str, config: ModelConfig, vocab_size: int) -> nn.Module:
    moe = config.moe
    assert config.activation == ("clamped_swiglu" if family == "gpt_oss" else "swiglu")
    common: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads or config.num_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": _rope_parameters(config),
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": getattr(config.rope_scaling, "original_length", config.seq_len),
        "attention_bias": config.attention.qkv_bias,
        "sliding_window": config.attention.window,
        "attn_implementation": "eager",  # written out there; the others are torch's kernel, which is ours too
    }
    if moe is None:
        return dense(family, common, config, layer_types(config))
    router: Any = moe.router
    common |= {"num_experts_per_tok": router.top_k, "experts_implementation": "eager"}
    match family:
        case "mixtral":
            return MixtralForCausalLM(
                MixtralConfig(**common, num_local_experts=moe.num_experts, intermediate_size=moe.d_ff)
            )
        case "qwen2_moe":
            shared = {"shared_expert_intermediate_size": moe.shared_width, "qkv_bias": config.attention.qkv_bias}
            slides = {"use_sliding_window": any(config.windows), "layer_types": layer_types(config)}
            return Qwen2MoeForCausalLM(Qwen2MoeConfig(**common, **_qwen(config), **shared, **slides))
        case "qwen3_moe":
            return Qwen3MoeForCausalLM(Qwen3MoeConfig(**common, **_qwen(config)))
        case "olmoe":
            return OlmoeForCausalLM(
                OlmoeConfig(
                    **common,
                    num_experts=moe.num_experts,
                    intermediate_size=moe.d_ff,
                    norm_topk_prob=router.normalize,
                    clip_qkv=config.attention.clip_qkv,
                    pad_token_id=None,  # else one token's embedding does not learn
                    eos_token_id=None,
                )
            )
        case "dots1":
            return Dots1ForCausalLM(Dots1Config(**common, **_biased(config), layer_types=layer_types(config)))
        case "glm4_moe":
            more: dict[str, Any] = {"use_qk_norm": config.qk_norm, "num_mtp_layers": 0}
            return Glm4MoeForCausalLM(Glm4MoeConfig(**common, **_biased(config), **more))
        case "gpt_oss":
            return gpt_oss(common, config, layer_types(config))
        case "minimax_m2":
            return minimax_m2(common, config)
        case _:
            return deepseek(family, common, config)


def layer_types(config: ModelConfig) -> list[str]:
    """Return their name for the attention of each layer."""
    return ["full_attention" if window is None else "sliding_attention" for window in config.windows]


def _qwen(config: ModelConfig) -> dict[str, Any]:
    moe = config.moe
    assert moe is not None
    dense = [layer for layer in range(config.num_layers) if layer not in config.moe_layers]
    if moe.every > 1:  # by their own rule, after the first dense layers
        dense = list(range(moe.first_dense_layers))
    return {
        "num_experts": moe.num_experts,
        "intermediate_size": config.d_ff,
        "moe_intermediate_size": moe.d_ff,
        "norm_topk_prob": getattr(moe.router, "normalize"),  # noqa: B009 - of top_k
        "mlp_only_layers": dense,
        "decoder_sparse_step": moe.every,
    }


def _rope_parameters(config: ModelConfig) -> dict[str, Any]:
    """Return their description of rotary positions."""
    scaling = {} if config.rope_scaling is None else config.rope_scaling.model_dump(exclude_none=True)
    names = {"kind": "rope_type", "original_length": "original_max_position_embeddings"}
    theirs = {"rope_type": "default"} | {names.get(key, key): value for key, value in scaling.items()}
    if theirs["rope_type"] == "dynamic":
        del theirs["original_max_position_embeddings"]
    return {**theirs, "rope_theta": config.rope_theta, "partial_rotary_factor": config.attention.rotary_fraction}


def _biased(config: ModelConfig) -> dict[str, Any]:
    """Return options of the models with sigmoid scores and a selection bias; without groups there is one."""
    moe = config.moe
    assert moe is not None
    router: Any = moe.router
    return {
        "n_routed_experts": moe.num_experts,
        "n_shared_experts": moe.num_shared_experts,
        "intermediate_size": config.d_ff,
        "moe_intermediate_size": moe.d_ff,
        "first_k_dense_replace": moe.first_dense_layers,
        "n_group": getattr(router, "groups", 1),
        "topk_group": getattr(router, "groups_kept", 1),
        "norm_topk_prob": router.normalize,
        "routed_scaling_factor": router.scale,
    }


def _names(config: ModelConfig) -> dict[str, list[str]]:
    """Return the names in a layer; the family is that which alone has what the config has."""
    moe = config.moe
    if moe is None:
        return _IN_A_LAYER
    if moe.shared_gate:
        return _IN_A_LAYER | _GATED_SHARED
    if config.activation == "clamped_swiglu":
        return _IN_A_LAYER | GPT_OSS
    is_minimax = config.attention.qk_norm_over == "all_heads" and moe.router.kind == "bias_balanced"
    return _IN_A_LAYER | (MINIMAX_M2 if is_minimax else {})


def in_their_names(ours: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Return tensors of our model (weights, buffers or gradients) under transformers' names, fused ones split."""
    heads, kv_heads = config.num_heads, config.num_kv_heads or config.num_heads
    in_a_layer = _names(config)
    found: dict[str, Tensor] = {}
    for name, tensor in ours.items():
        if name in _WHOLE:
            found[_WHOLE[name]] = tensor
            continue
        _, layer, part = name.split(".", 2)
        if config.attention.latent is not None and part.startswith("attention."):
            pieces = latent_in_their_names(part.removeprefix("attention."), tensor, config)
            found |= {f"model.layers.{layer}.self_attn.{theirs}": piece for theirs, piece in pieces.items()}
            continue
        names = in_a_layer[part]
        if config.activation == "clamped_swiglu" and part.startswith("ffn.experts."):
            tensor = in_layout_of_gpt_oss(part.removeprefix("ffn.experts."), tensor)
        rows = [n * config.head_dim for n in (heads, kv_heads, kv_heads)]
        pieces = tensor.split(rows) if len(names) == 3 else tensor.chunk(len(names))
        found |= {f"model.layers.{layer}.{theirs}": piece for theirs, piece in zip(names, pieces, strict=True)}
    return found


def _copy_weights(ours: GPT, theirs: nn.Module) -> None:
    """Copy all weights and buffers into the transformers model.

    Raises:
        AssertionError: if one of the two has a tensor that the other has not.
    """
    tensors = in_their_names({**dict(ours.named_parameters()), **dict(ours.named_buffers())}, ours.config)
    tied = {"lm_head.weight"} if ours.head is None else set()
    wanted = dict(theirs.named_parameters()) | {
        name: buffer for name, buffer in theirs.named_buffers() if not name.endswith("inv_freq")
    }
    assert wanted.keys() - tied == tensors.keys()
    with torch.no_grad():
        for name, tensor in tensors.items():
            assert wanted[name].shape == tensor.shape, name
            is_centered = ours.config.norm == "rms_plus_one" and name.endswith("norm.weight")
            wanted[name].copy_(tensor + 1 if is_centered else tensor)


def their_logits(theirs: nn.Module, tokens: Tensor, mask: Tensor | None) -> Tensor:
    """Return logits (B, S, V).

    Args:
        theirs: their model.
        tokens: (B, S).
        mask: (B, S) which tokens are valid, or (B, 1, S, S) which keys each query sees; None: causal.
    """
    dtype = next(theirs.parameters()).dtype
    given: Any = None
    if mask is not None and mask.dim() == 2:
        given = mask.long()
    elif mask is not None:
        given = _added_masks(theirs, mask, dtype)
    with _in(dtype):
        return theirs(input_ids=tokens, attention_mask=given, use_cache=False).logits


def _added_masks(theirs: nn.Module, mask: Tensor, dtype: torch.dtype) -> Tensor | dict[str, Tensor]:
    """Return what they add to the scores so that a query sees the keys of a mask (B, 1, S, S), and of its window.

    They take a mask of four dimensions as it is, for all layers or for each kind of layer.
    """
    config: Any = theirs.config
    window = getattr(config, "sliding_window", None)
    within = mask if not window else mask.triu(1 - window)
    full, sliding = (
        torch.zeros(mask.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min) for seen in (mask, within)
    )
    if getattr(config, "layer_types", None) is None:
        return sliding
    return {"full_attention": full, "sliding_attention": sliding}
