"""Initial weights: a function of seed, name and expert, with the stated spread."""

import torch

from tests.builders import make_model, tiny_model_config
from trainer.models.gpt import GPT


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
