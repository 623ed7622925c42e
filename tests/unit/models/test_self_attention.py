"""A layer of attention and its gradients are those of transformers where no whole model of theirs is ours."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma2.configuration_gemma2 import Gemma2Config
from transformers.models.gemma2.modeling_gemma2 import Gemma2Attention
from transformers.models.gpt_oss.configuration_gpt_oss import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention

from tests.builders import tiny_model_config
from tests.transformers_models import WithoutFloat32
from trainer.models.config import ModelConfig
from trainer.models.rotary_embedding import rotary_embedding
from trainer.models.self_attention import Attention
from trainer.ops.attention_mask import AttentionMask

B, S, D = 3, 9, 32


def _config(**attention: Any) -> ModelConfig:
    return tiny_model_config(d_model=D, num_heads=4, num_kv_heads=2, rope_theta=50.0, attention=attention, seq_len=S)


def _gemma2(config: ModelConfig) -> nn.Module:
    scale = config.attention.scale
    scalar = config.head_dim if scale is None else round(scale**-2)
    theirs = Gemma2Config(
        hidden_size=D,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads or config.num_heads,
        head_dim=config.head_dim,
        query_pre_attn_scalar=scalar,
        attn_logit_softcapping=config.attention.softcap,
    )
    theirs._attn_implementation = "eager"
    return Gemma2Attention(theirs, 0)


def _gpt_oss(config: ModelConfig) -> nn.Module:
    theirs = GptOssConfig(
        hidden_size=D,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads or config.num_heads,
        head_dim=config.head_dim,
        attention_bias=config.attention.qkv_bias,
    )
    theirs._attn_implementation = "eager"
    return GptOssAttention(theirs, 0)


def _stacked(theirs: nn.Module, what: str) -> dict[str, Tensor]:
    """Their weights, or gradients, under our names."""
    found = {name: p.grad if what == "grad" else p.data for name, p in theirs.named_parameters()}
    stacked = {}
    for kind in ("weight", "bias"):
        parts = [found.get(f"{part}_proj.{kind}") for part in ("q", "k", "v")]
        if all(part is not None for part in parts):
            stacked |= {f"qkv.{kind}": torch.cat(parts), f"out.{kind}": found[f"o_proj.{kind}"]}  # type: ignore[arg-type]
    return stacked | ({"sinks": found["sinks"]} if "sinks" in found else {})  # type: ignore[return-value]


CASES = {
    "capped scores of their own scale": (_gemma2, {"softcap": 1.5, "scale": 7**-0.5, "head_dim": 10}),
    "capped scores, a window": (_gemma2, {"softcap": 0.5, "window": 3}),
    "another scale": (_gemma2, {"scale": 0.5}),
    "sinks, biases": (_gpt_oss, {"sinks": True, "qkv_bias": True, "out_bias": True}),
    "sinks, a window": (_gpt_oss, {"sinks": True, "qkv_bias": True, "out_bias": True, "window": 2}),
}


@pytest.mark.parametrize(("build", "attention"), CASES.values(), ids=CASES.keys())
def test_attention_and_its_gradients_are_those_of_transformers(build: Any, attention: dict[str, Any]) -> None:
    config, dtype = _config(**attention), torch.float64
    generator = torch.Generator().manual_seed(2)
    theirs, ours = build(config).double(), Attention(config).double()
    for p in theirs.parameters():
        p.data.normal_(0, 0.5, generator=generator)
    ours.load_state_dict(_stacked(theirs, "data"))
    x = torch.randn(B, S, D, generator=generator, dtype=dtype)
    rotary = rotary_embedding(config, torch.arange(S), dtype)
    mask = AttentionMask(document=torch.tensor([[0] * 9, [0] * 4 + [1] * 5, [3] * 9]), window=config.attention.window)
    seen = mask.dense()
    table = rotary if build is _gemma2 else rotary[..., : config.head_dim // 2]  # GPT-OSS has one of each pair
    mine, its = x.clone().requires_grad_(), x.clone().requires_grad_()
    found = ours(mine, nn.Identity(), rotary, seen, None)
    hidden = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
    with WithoutFloat32():
        expected = theirs(its, position_embeddings=tuple(table[:, None]), attention_mask=hidden)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    weight = torch.randn(found.shape, generator=generator, dtype=dtype)
    (found * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(mine.grad, its.grad, rtol=0, atol=1e-12)
    gradients = {name: p.grad for name, p in ours.named_parameters()}
    expected_gradients = _stacked(theirs, "grad")
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        assert gradient is not None and gradient.abs().max() > 1e-3, name
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=0, atol=1e-12, msg=name)
