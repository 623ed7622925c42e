"""Initial weights: a function of seed, name and expert, with the configured standard deviation."""

import pytest
import torch
from torch import nn

from tests.builders import latent_attention, make_engine, make_model, tiny_model_config
from tests.registries import ROUTERS, num_experts_of
from trainer.models.gpt import GPT
from trainer.models.initialize import initialize
from trainer.models.parameter_roles import is_decayed, is_matrix, parameter_role
from trainer.moe.routers.top_k import TopKRouter


def _parameters(model: GPT) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters())


def test_the_same_seed_gives_the_same_weights_and_another_seed_others() -> None:
    a, b, c = (make_model(tiny_model_config(), seed=s) for s in (3, 3, 4))
    for name, p in _parameters(a).items():
        assert torch.equal(p, _parameters(b)[name])
        assert "norm" in name or not torch.equal(p, _parameters(c)[name])


def test_an_expert_does_not_depend_on_how_many_others_there_are() -> None:
    few = _parameters(make_model(tiny_model_config({"num_experts": 3})))
    many = _parameters(make_model(tiny_model_config({"num_experts": 7})))
    assert torch.equal(few["blocks.1.ffn.experts.w_in"], many["blocks.1.ffn.experts.w_in"][:3])


def test_an_expert_does_not_depend_on_the_rank_that_holds_it() -> None:
    config, name = tiny_model_config({"num_experts": 4}), "blocks.0.ffn.experts.w_in"
    model = GPT(config, 32)
    for moe in model.moe_layers():
        moe.experts.keep([3, 1])
    initialize(model, 0)
    assert torch.equal(_parameters(model)[name], _parameters(make_model(config))[name][[3, 1]])


def test_biases_of_experts_start_at_0_and_do_not_decay() -> None:
    parameters = _parameters(
        make_model(tiny_model_config({"expert_bias": True, "router": {"kind": "top_k", "gate_bias": True}}))
    )
    biases = {name: p for name, p in parameters.items() if name.endswith("bias")}
    assert {name.split(".", 3)[3] for name in biases} == {"experts.w_in_bias", "experts.w_out_bias", "router.gate.bias"}
    assert not any(p.any() or is_decayed(name, p) for name, p in biases.items())
    assert {parameter_role(name) for name in biases} == {"expert", "router"}


def test_experts_are_distinct() -> None:
    w = _parameters(make_model(tiny_model_config()))["blocks.0.ffn.experts.w_out"]
    assert all(not torch.equal(w[i], w[j]) for i in range(4) for j in range(i))


def test_float64_starts_from_the_float32_values() -> None:
    single, double = make_model(tiny_model_config()), make_model(tiny_model_config(), dtype=torch.float64)
    for name, p in _parameters(single).items():
        assert torch.equal(p.double(), _parameters(double)[name])


def test_spreads_are_those_of_the_config_and_smaller_into_the_residual_stream() -> None:
    config = tiny_model_config(num_layers=8, d_model=64, init_std=0.02)
    p = _parameters(make_model(config, vocab_size=256))
    assert abs(float(p["embedding.weight"].std()) - 0.02) < 5e-4
    assert abs(float(p["blocks.0.attention.qkv.weight"].std()) - 0.02) < 1e-3
    assert abs(float(p["blocks.0.attention.out.weight"].std()) - 0.005) < 3e-4
    assert abs(float(p["blocks.0.ffn.experts.w_out"].std()) - 0.005) < 3e-4
    assert torch.equal(p["norm.weight"], torch.ones(64))


def test_norms_multiply_by_one_and_sinks_weigh_as_much_as_a_score_of_zero() -> None:
    config = tiny_model_config(norm="rms_plus_one", qk_norm=True, attention={"sinks": True, "qkv_bias": True})
    model = make_model(config)
    for name, p in _parameters(model).items():
        if "norm" in name or name.endswith(("sinks", "bias")):
            assert torch.equal(p, torch.zeros_like(p)), name
    x = torch.randn(3, 16)
    plain = make_model(tiny_model_config()).norm
    assert torch.equal(model.norm(x), plain(x))


def test_latent_attention_starts_like_other_attention() -> None:
    """Its norms at 1; what it writes to the residual stream, and nothing else, with a smaller spread."""
    fields = latent_attention(q_lora_rank=48, kv_lora_rank=40, v_head_dim=32)
    config = tiny_model_config(num_layers=8, d_model=64, init_std=0.02, **fields)
    found = {
        name.removeprefix("blocks.7.attention."): p
        for name, p in _parameters(make_model(config)).items()
        if name.startswith("blocks.7.attention.")
    }
    for norm, width in (("q_norm.weight", 48), ("kv_norm.weight", 40)):
        assert torch.equal(found.pop(norm), torch.ones(width))
    spreads = {name: round(float(p.detach().std()), 3) for name, p in found.items()}
    assert spreads == {"qkv_a.weight": 0.02, "q_b.weight": 0.02, "kv_b.weight": 0.02, "out.weight": 0.005}


@pytest.mark.parametrize("attention", [{"qk_norm": True}, latent_attention()], ids=["plain", "latents"])
@pytest.mark.parametrize("kind", ROUTERS)
def test_only_matrices_are_drawn_and_decayed_whatever_the_router(kind: str, attention: dict) -> None:
    """A scale, temperature or bias initialized like a matrix would start anywhere and decay to 0."""
    experts = num_experts_of(kind)
    model = {"num_experts": experts, "num_shared_experts": 1, "router": {"kind": kind}}
    engine = make_engine(tiny_model_config(model, init_std=0.3, **attention), weight_decay=0.1)
    decayed = {id(p): group["weight_decay"] > 0 for group in engine.optimizer.param_groups for p in group["params"]}
    stated = {
        f"{prefix}.{name}": value
        for prefix, module in engine.model.named_modules()
        for name, value in getattr(module, "initial_values", {}).items()
    }
    assert stated.keys() <= engine.parameters.keys()
    for name, parameter in engine.parameters.items():
        role = parameter_role(name)
        assert decayed[id(parameter)] == (is_matrix(name, parameter) and role != "embedding"), name
        if is_matrix(name, parameter):
            assert parameter.dim() == (3 if role == "expert" else 2) and float(parameter.detach().std()) > 0.05, name
        else:
            start = 1.0 if role == "norm" else stated[name]
            assert torch.equal(parameter, torch.full_like(parameter, start)), name


def test_the_temperature_of_cosine_starts_at_what_its_source_says() -> None:
    model = make_model(tiny_model_config({"router": {"kind": "cosine"}}, init_std=0.3))
    names = [name for name in _parameters(model) if name.endswith("log_scale")]
    assert len(names) == 2 and all(float(_parameters(model)[name]) == 0.0 for name in names)


def test_a_bias_that_a_router_adds_starts_from_0_and_a_scale_from_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TopKRouter, "initial_values", {"scale": 2.0})
    model = make_model(tiny_model_config())
    router = model.moe_layers()[0].router
    gate, scale, norm = nn.Linear(16, 4), nn.Parameter(torch.empty(4)), nn.LayerNorm(16, bias=False)
    router.gate, router.scale, router.x_norm = gate, scale, norm
    initialize(model, 0)
    assert torch.equal(gate.bias, torch.zeros(4)) and float(gate.weight.detach().std()) > 0.1
    assert torch.equal(scale, torch.full((4,), 2.0)) and torch.equal(norm.weight, torch.ones(16))
