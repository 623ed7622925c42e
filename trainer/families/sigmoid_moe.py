"""Keys of DeepSeek-V3's MoE layers, which dots.llm1 and GLM-4-MoE have too. Imports no torch."""

from collections.abc import Iterator
from typing import Any

from trainer.config.base import Problem
from trainer.families.decoder_keys import moe_layer_values
from trainer.families.hf_config import ForeignConfigError, HFConfig
from trainer.families.routing_form import required_form, routing_form
from trainer.models.config import ModelConfig


def sigmoid_moe_keys(model: ModelConfig) -> dict[str, Any]:
    """Return the MoE keys of configs with sigmoid routing."""
    moe = model.moe
    assert moe is not None, "refused before its config is written"
    form = required_form(moe)
    return {
        "intermediate_size": model.d_ff,
        "moe_intermediate_size": moe.d_ff,
        "n_routed_experts": moe.num_experts,
        "n_shared_experts": moe.shared_width // moe.d_ff,
        "num_experts_per_tok": form.top_k,
        "n_group": form.groups,
        "topk_group": form.groups_kept,
        "norm_topk_prob": form.normalize,
        "routed_scaling_factor": form.scale,
        "first_k_dense_replace": model.moe_layers[0],
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
    }


def sigmoid_moe_values(hf: HFConfig, num_layers: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read the MoE keys of configs with sigmoid routing: values of `model`, and of `model.moe`."""
    hf.expect("scoring_func", "sigmoid", "noaux_tc")
    hf.expect("topk_method", "noaux_tc")
    hf.expect("moe_layer_freq", 1)
    groups, kept = hf.integer("n_group", default=1), hf.integer("topk_group", default=1)
    first = hf.integer("first_k_dense_replace", default=0)
    router = {
        "top_k": hf.integer("num_experts_per_tok"),
        "score": "sigmoid",
        "normalize": hf.boolean("norm_topk_prob", default=False),
        "scale": hf.number("routed_scaling_factor", default=1.0),
    }
    limits = {"kind": "group_limited", "groups": groups, "groups_kept": kept, "group_score": "best_two"}
    if first >= num_layers:
        raise ForeignConfigError(f"first_k_dense_replace: {first} leaves no MoE layer among {num_layers}")
    moe = {
        **moe_layer_values(range(first, num_layers), num_layers),
        "num_experts": hf.integer("n_routed_experts"),
        "num_shared_experts": hf.integer("n_shared_experts", default=0),
        "d_ff": hf.integer("moe_intermediate_size"),
        "router": router | (limits if kept < groups else {"kind": "bias_balanced"}),
        "balance": {"coef": 0.0},
    }
    return {"d_ff": hf.integer("intermediate_size")}, moe


def needs_two_experts_a_group(model: ModelConfig, name: str) -> Iterator[Problem]:
    """Refuse groups of one expert, whose best two transformers looks for in vain."""
    form = None if model.moe is None else routing_form(model.moe)
    if form is not None and model.moe is not None and form.groups == model.moe.num_experts > 1:
        yield Problem("moe.router.groups", f"{form.groups}: {name} scores a group by two experts, and these have one")


def needs_shared_experts(model: ModelConfig, name: str) -> Iterator[Problem]:
    """Refuse a model without shared experts, for which transformers would have tensors of size 0."""
    if model.moe is not None and model.moe.num_shared_experts == 0:
        yield Problem("moe.num_shared_experts", f"0: {name} has at least 1")
