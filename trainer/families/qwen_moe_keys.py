"""Keys of the MoE layers that Qwen's configs share. Imports no torch."""

from typing import Any

from trainer.families.decoder_keys import balance_from_hf, balance_to_hf, moe_layer_values, softmax_router_from_hf
from trainer.families.hf_config import ForeignConfigError, HFConfig
from trainer.families.routing_form import required_form
from trainer.models.config import ModelConfig


def qwen_moe_to_hf(model: ModelConfig) -> dict[str, Any]:
    """Return the MoE keys of Qwen's configs."""
    assert model.moe is not None, "refused before its config is written"
    form = required_form(model.moe)
    return {
        **balance_to_hf(model),
        "intermediate_size": model.d_ff,
        "moe_intermediate_size": model.moe.d_ff,
        "num_experts": model.moe.num_experts,
        "num_experts_per_tok": form.top_k,
        "norm_topk_prob": form.normalize,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [layer for layer in range(model.num_layers) if not model.has_experts(layer)],
    }


def qwen_moe_values(hf: HFConfig, num_layers: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read the MoE keys of Qwen's configs: values of `model`, and of `model.moe`."""
    step, dense = hf.integer("decoder_sparse_step", default=1), hf.optional("mlp_only_layers") or []
    if not isinstance(dense, list) or not all(type(layer) is int for layer in dense):
        raise ForeignConfigError(f"mlp_only_layers: {dense!r} is no list of layers")
    if step < 1:
        raise ForeignConfigError(f"decoder_sparse_step: {step} is less than 1")
    layers = [layer for layer in range(num_layers) if layer not in dense and (layer + 1) % step == 0]
    moe = {
        **moe_layer_values(layers, num_layers),
        "num_experts": hf.integer("num_experts", "num_local_experts"),
        "d_ff": hf.integer("moe_intermediate_size"),
        "router": softmax_router_from_hf(hf),
        "balance": balance_from_hf(hf),
    }
    return {"d_ff": hf.integer("intermediate_size")}, moe
