"""Parameter and FLOP counts against torch's own counters."""

from collections.abc import Iterable
from typing import cast, get_args

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.builders import latent_attention, make_batch, make_model, tiny_model_config
from trainer.models.block import Block
from trainer.models.config import Recompute
from trainer.models.flops import model_size
from trainer.models.freeze import freeze_parameters, frozen_names
from trainer.models.gpt import GPT
from trainer.models.parameter_roles import is_adapter, parameter_role

SHAPES = {
    "moe": ({}, {}),
    "all experts": ({"router": {"kind": "dense"}}, {}),
    "shared, first dense, tied": ({"num_shared_experts": 1, "first_dense_layers": 1}, {"tie_embeddings": True}),
    "shared, gated": ({"num_shared_experts": 2, "shared_d_ff": 7, "shared_gate": True, "layers": [1]}, {}),
    "latents": ({}, latent_attention()),
    "latents, plain queries": ({}, latent_attention(q_lora_rank=None)),
    "sinks, capped scores": ({}, {"attention": {"sinks": True, "softcap": 1.0}}),
    "adapters of shared experts": (
        {"num_shared_experts": 1, "shared_gate": True, "first_dense_layers": 1},
        {"lora": {"rank": 2, "targets": ["dense", "shared", "attention.out"]}},
    ),
    "adapters, and routers that learn": ({}, {"lora": {"rank": 2, "targets": ["attention"], "trains": ["router"]}}),
    "adapters, latents, and an embedding that learns": (
        {},
        {**latent_attention(), "lora": {"rank": 2, "targets": ["attention.q_b"], "trains": ["embedding"]}},
    ),
    "gelu, top 1": ({"router": {"kind": "top_k", "top_k": 1, "normalize": False}}, {"activation": "gelu"}),
}


@pytest.mark.parametrize(("moe", "fields"), SHAPES.values(), ids=SHAPES.keys())
def test_flops_equal_torch_s_counter_forward_and_backward(moe: dict, fields: dict) -> None:
    model, batch = make_model(tiny_model_config(moe, **fields)), make_batch(2, 8)
    size = model_size(model)
    with sdpa_kernel(SDPBackend.MATH):  # torch does not count the fused attention of the CPU
        with FlopCounterMode(display=False) as forward:
            loss = model(batch).loss_sum
        with FlopCounterMode(display=False) as backward:
            loss.backward()
    assert forward.get_total_flops() == size.forward_flops_per_token * 16
    assert forward.get_total_flops() + backward.get_total_flops() == size.training_flops_per_token * 16


def test_adapters_of_experts_compute_their_narrow_products_once_more_in_the_backward_pass() -> None:
    model, batch = make_model(tiny_model_config(lora={"rank": 2})), make_batch(2, 8)
    size = model_size(model)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(batch).loss_sum.backward()
    again = 2 * 16 * 2 * 2 * (16 + 12) * 2  # layers, T tokens, k experts, rank, D and F
    assert counter.get_total_flops() - again == size.training_flops_per_token * 16
    adapters = sum(p.numel() for name, p in model.named_parameters() if is_adapter(name))
    assert size.learning_parameters == adapters < size.total_parameters


@pytest.mark.parametrize("freeze", [["experts"], ["router", "attention"], ["shared", "dense", "head"]])
def test_frozen_weights_have_a_product_less(freeze: list[str]) -> None:
    model, batch = make_model(tiny_model_config({"num_shared_experts": 1, "first_dense_layers": 1})), make_batch(2, 8)
    freeze_parameters(model, frozen_names(model, freeze))
    size = model_size(model)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(batch).loss_sum.backward()
    assert counter.get_total_flops() == size.training_flops_per_token * 16 < 16 * 3 * size.forward_flops_per_token
    assert size.learning_parameters == sum(p.numel() for p in model.parameters() if p.grad is not None)


def test_a_window_leaves_out_the_keys_beyond_it() -> None:
    window = {"window": 3, "window_pattern": ["full", "sliding"]}
    all_keys, few = (make_model(tiny_model_config(attention=fields)) for fields in ({}, window))
    saved = model_size(all_keys).forward_flops_per_token - model_size(few).forward_flops_per_token
    assert saved == 2 * (8 - 3) * 4 * (4 + 4), "one layer of two; H heads; scores and values of width d"
    long = make_model(tiny_model_config(attention={"window": 100}))
    assert model_size(long) == model_size(all_keys)


@pytest.mark.parametrize("fields", [{}, {"tie_embeddings": True}])
def test_a_loss_in_chunks_has_no_more_flops(fields: dict) -> None:
    """The products of the head's gradient are in the forward pass."""
    model, batch = make_model(tiny_model_config(**fields)), make_batch(2, 8)
    model.loss_chunk = 5
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        (model(batch).loss_sum / 16).backward()
    assert counter.get_total_flops() == model_size(model).training_flops_per_token * 16


@pytest.mark.parametrize("kernel", ["loop", "fused"])
@pytest.mark.parametrize("fields", [{"qk_norm": True}, {"activation": "gelu"}, latent_attention()], ids=str)
def test_recomputation_costs_the_products_that_it_says(fields: dict, kernel: str) -> None:
    """None for norms and activations; of every feed-forward the first: no gradient needs the result of the last."""
    config = tiny_model_config({"num_shared_experts": 1, "first_dense_layers": 1}, **fields)
    batch, totals = make_batch(2, 8), {}
    for recompute in get_args(Recompute):
        model = make_model(config, kernel=kernel)
        for block in cast(Iterable[Block], model.blocks):
            block.set_recompute(recompute)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(batch).loss_sum.backward()
        totals[recompute] = counter.get_total_flops() - model_size(model).training_flops_per_token * 16
    width = 24 if config.activation == "swiglu" else 12  # of an expert, before its activation
    first = 2 * 16 * 2 * 16 * width  # T tokens, 2 experts each, D
    # Projections; S x S scores and weighted values of each head.
    attention = 2 * 16 * 16 * (32 + 16) + 4 * 8 * 16 * 16
    if "attention" in fields:
        attention = 2 * 16 * (16 * (10 + 12 + 4) + 10 * 4 * 10 + 12 * 4 * 20 + 4 * 14 * 16) + 2 * 8 * 16 * 4 * (10 + 14)
    dense, shared = 2 * 16 * 16 * 2 * width, 2 * 16 * 16 * width  # first products
    assert totals == {
        "none": 0,
        "norms_and_activations": 0,
        "experts": first,
        "block": first + 2 * attention + dense + shared,
    }


def test_active_parameters_leave_idle_experts_out() -> None:
    config = tiny_model_config({"num_experts": 4, "router": {"kind": "top_k", "top_k": 1, "normalize": False}})
    model = make_model(config)
    size = model_size(model)
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    assert size.total_parameters == sum(p.numel() for p in model.parameters())
    assert size.total_parameters - size.active_parameters == experts * 3 // 4


COUNTED = {
    **SHAPES,
    "biases, clamped": ({"expert_bias": True, "num_shared_experts": 1}, {"activation": "clamped_swiglu"}),
    "every second, grouped queries": ({"every": 2}, {"num_kv_heads": 1, "qk_norm": True, "num_layers": 5}),
    "adapters": ({"num_shared_experts": 1, "every": 2}, {"num_layers": 5, "num_kv_heads": 1, "lora": {"rank": 3}}),
    "adapters of latents": ({}, {**latent_attention(), "lora": {"rank": 3}}),
    "latents, biases": ({}, latent_attention(biases=True)),
    "dense": (None, {}),
    "sinks": ({}, {"attention": {"sinks": True}}),
    "biases": ({}, {"attention": {"qkv_bias": True, "out_bias": True}}),
    "norms over all heads": ({}, {"qk_norm": True, "attention": {"qk_norm_over": "all_heads", "head_dim": 6}}),
}


@pytest.mark.parametrize(("moe", "fields"), COUNTED.values(), ids=COUNTED.keys())
def test_a_config_counts_the_weights_that_its_model_has(moe: dict | None, fields: dict) -> None:
    """Without those of the routers, which the config does not count."""
    config = tiny_model_config(moe, **fields)
    config = config if moe is not None else config.model_copy(update={"moe": None})
    with torch.device("meta"):
        model = GPT(config, 32)
    counted = config.weights(vocab_size=32)
    sizes = {name: p.numel() for name, p in model.named_parameters() if parameter_role(name) != "router"}
    experts = sum(size for name, size in sizes.items() if parameter_role(name) == "expert")
    assert counted.dense == sum(sizes.values()) - experts
    assert counted.expert * (config.moe.num_experts if config.moe is not None else 0) == experts


def test_a_model_on_the_meta_device_can_be_counted() -> None:
    with torch.device("meta"):
        model = GPT(tiny_model_config(), 32)
    assert model_size(model).total_parameters == model_size(make_model(tiny_model_config())).total_parameters
