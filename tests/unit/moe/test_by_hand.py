"""Layers and models built by hand are initialized by their constructors, and cost nothing on the meta device."""

import math
from typing import Any

import pytest
import torch

from tests.builders import make_batch, make_context, moe_config, tiny_model_config
from tests.laws.test_router_oracles import VARIANTS
from tests.registries import num_experts_of
from trainer.models.gpt import GPT
from trainer.models.norm import RMSNorm
from trainer.moe.dispatch.local import LocalDispatcher
from trainer.moe.experts import Experts
from trainer.moe.layer import MoE
from trainer.moe.layer_options import CapacityConfig


def _num_experts(router: dict[str, Any]) -> int:
    return num_experts_of(router["kind"])


@pytest.mark.usefixtures("unwritten_memory_is_nan")
@pytest.mark.parametrize("router", VARIANTS, ids=str)
def test_a_layer_built_by_hand_computes(router: dict[str, Any]) -> None:
    num_experts = _num_experts(router)
    layer = MoE(
        router=moe_config(num_experts=num_experts, router=router).router.build(
            d_model=16, num_experts=num_experts, layer=0
        ),
        experts=Experts(num_experts, 16, 12, activation="swiglu", kernel="loop"),
        dispatcher=LocalDispatcher(),
        capacity=CapacityConfig(),
    )
    x = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(0))
    y, _ = layer(x, make_context(2, 8))
    assert y.isfinite().all() and y.any()


@pytest.mark.usefixtures("unwritten_memory_is_nan")
@pytest.mark.parametrize("router", VARIANTS, ids=str)
def test_a_model_built_by_hand_has_no_weight_of_chance_memory(router: dict[str, Any]) -> None:
    moe = {"num_experts": _num_experts(router), "num_shared_experts": 1, "first_dense_layers": 1, "router": router}
    model = GPT(tiny_model_config(moe, qk_norm=True), 32)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert tensor.isfinite().all(), name
    loss = float(model(make_batch(4, 8)).loss_sum.detach()) / 32
    assert abs(loss - math.log(32)) < 1, "about what a guess costs"


def test_experts_start_as_linear_layers_do_and_each_by_itself() -> None:
    experts = Experts(8, 64, 48, activation="swiglu", kernel="loop")
    for weight in (parameter.detach() for parameter in experts.parameters()):
        linear = torch.nn.Linear(weight.shape[2], weight.shape[1]).weight.detach()
        assert float(weight[0].std()) == pytest.approx(float(linear.std()), rel=0.1)
        assert len({float(expert[0, 0]) for expert in weight}) == 8
    assert RMSNorm(5, eps=0.0).weight.tolist() == [1.0] * 5


def test_experts_that_are_kept_keep_their_values() -> None:
    experts = Experts(5, 6, 4, activation="gelu", kernel="loop")
    before = [weight.detach().clone() for weight in experts.parameters()]
    experts.keep([1, 4])
    assert experts.numbers == (1, 4)
    assert all(torch.equal(now, weight[[1, 4]]) for now, weight in zip(experts.parameters(), before, strict=True))


def test_on_meta_a_model_of_terabytes_costs_nothing() -> None:
    huge = tiny_model_config({"num_experts": 512, "d_ff": 8192}, num_layers=4, d_model=16384, num_heads=128)
    state = torch.get_rng_state()
    with torch.device("meta"):
        model = GPT(huge, 1000)
        model.moe_layers()[0].experts.keep(range(100, 300))
    assert all(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    assert sum(parameter.numel() for parameter in model.parameters()) > 6e11
    assert torch.equal(state, torch.get_rng_state()), "nothing was drawn"
