"""Rotary tables of published configs are those of transformers."""

from typing import Any

import pytest
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.configuration_llama import LlamaConfig

from tests.builders import make_batch, make_model, tiny_model_config
from tests.transformers_models import WithoutFloat32
from trainer.models.config import ModelConfig
from trainer.models.rotary_embedding import rotary_embedding, rotary_scale, scaled_rates

YARN = {"kind": "yarn", "original_length": 4096}
PUBLISHED: dict[str, tuple[int, float, dict[str, Any]]] = {  # width, theta, scaling
    "GPT-OSS": (64, 150000.0, {**YARN, "factor": 32.0, "truncate": False}),
    "DeepSeek-V3": (64, 10000.0, {**YARN, "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 1.0}),
    "DeepSeek-V2": (64, 10000.0, {**YARN, "factor": 40.0, "mscale": 0.707, "mscale_all_dim": 0.5}),
    "Qwen3 long": (128, 1e6, {**YARN, "factor": 4.0, "original_length": 32768, "attention_factor": 0.8}),
    "Llama 3.1": (128, 500000.0, {"kind": "llama3", "factor": 8.0, "original_length": 8192}),
    "linear": (128, 10000.0, {"kind": "linear", "factor": 2.5}),
    "dynamic": (128, 10000.0, {"kind": "dynamic", "factor": 2.0, "original_length": 2048}),
}
SEQ_LEN = 5000


def _config(width: int, theta: float, scaling: dict[str, Any] | None) -> ModelConfig:
    attention = {"head_dim": 2 * width, "rotary_fraction": 0.5}
    return tiny_model_config(attention=attention, rope_theta=theta, rope_scaling=scaling, seq_len=SEQ_LEN)


@pytest.mark.parametrize(("width", "theta", "scaling"), PUBLISHED.values(), ids=PUBLISHED.keys())
def test_rates_and_scale_are_those_of_transformers(width: int, theta: float, scaling: dict[str, Any]) -> None:
    config = _config(width, theta, scaling)
    assert config.rope_scaling is not None
    full = config.rope_scaling.model_dump(exclude={"kind", "original_length"})
    theirs = LlamaConfig(head_dim=2 * width, max_position_embeddings=scaling.get("original_length", SEQ_LEN))
    theirs.rope_parameters = {  # type: ignore[attr-defined]
        **full,
        "rope_type": scaling["kind"],
        "rope_theta": theta,
        "partial_rotary_factor": 0.5,
        "original_max_position_embeddings": scaling.get("original_length"),
    }
    with WithoutFloat32():
        rates, factor = ROPE_INIT_FUNCTIONS[scaling["kind"]](theirs, torch.device("cpu"), SEQ_LEN)
    torch.testing.assert_close(scaled_rates(config, torch.device("cpu")), rates, rtol=1e-13, atol=0)
    assert rotary_scale(config) == pytest.approx(factor, abs=1e-14)


@pytest.mark.parametrize("scaling", [s for *_, s in PUBLISHED.values()], ids=PUBLISHED.keys())
def test_scaling_changes_the_table_and_nothing_else_does(scaling: dict[str, Any]) -> None:
    """The law's own control: each kind turns some pair of a long text elsewhere."""
    plain, scaled = (
        rotary_embedding(_config(16, 1e4, one), torch.arange(SEQ_LEN), torch.float64) for one in (None, scaling)
    )
    assert plain.shape == scaled.shape == (2, SEQ_LEN, 16)
    assert (plain - scaled).abs().max() > 0.1


def test_a_dynamic_rotation_depends_on_neither_batch_nor_text() -> None:
    """By `seq_len`, so that what is read in pieces, or in shorter rows, is what is read at once."""
    scaling = {"kind": "dynamic", "factor": 4.0, "original_length": 4}
    model = make_model(tiny_model_config(rope_scaling=scaling, seq_len=12), dtype=torch.float64)
    whole, short = make_batch(2, 12), make_batch(2, 5)
    short.tokens.copy_(whole.tokens[:, :5])
    long, first = model(whole, want_logits=True).logits, model(short, want_logits=True).logits
    torch.testing.assert_close(long[:, :5], first, rtol=0, atol=1e-12)
