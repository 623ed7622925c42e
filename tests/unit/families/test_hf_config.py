"""A config.json is read as transformers reads it, whatever keys it leaves out or has in both generations."""

import copy
from typing import Any

import pytest
from transformers import AutoConfig, PreTrainedConfig

from tests.foreign_models import FAMILIES as SIZES
from trainer.families.hf_config import ForeignConfigError
from trainer.families.registry import FAMILIES

MORE = {"num_key_value_heads": 2, "num_experts_per_tok": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 64}
COMMON = {"vocab_size": 256, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 4, **MORE}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
CHANGES: list[dict[str, Any]] = [
    {"rope_parameters": {"rope_type": "default", "rope_theta": 777.0}},
    {"rope_parameters": {"rope_theta": 777.0}, "rope_theta": 5.0},
    {"rope_parameters": None, "rope_theta": 777.0, "rope_scaling": YARN},
    {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}},
    {"rope_scaling": YARN},
    {"rope_scaling": {"rope_type": "default"}},
    {"layer_types": None, "use_sliding_window": True, "max_window_layers": 2, "sliding_window": 8},
    {"layer_types": None, "max_window_layers": 1},
    {"layer_types": ["sliding_attention"], "use_sliding_window": True, "sliding_window": 8},
    {"head_dim": None},
    {"eos_token_id": [1, 2], "torch_dtype": "float16", "_attn_implementation_autoset": True},
]


def _resolved(family: str, values: dict[str, Any]) -> dict[str, Any]:
    """Return a config with every key of its family, as transformers completes it."""
    known = AutoConfig.for_model(**copy.deepcopy({**values, "model_type": family})).to_dict()
    general = PreTrainedConfig().to_dict().keys() - {"tie_word_embeddings", "model_type"}
    return {key: value for key, value in known.items() if key not in general}


def _read(family: str, values: dict[str, Any]) -> dict[str, Any] | str:
    try:
        return FAMILIES[family].from_hf(values)
    except ForeignConfigError as error:
        return str(error)


def _complete(family: str) -> dict[str, Any]:
    return _resolved(family, {**COMMON, **SIZES[family]})


@pytest.mark.parametrize("family", FAMILIES)
def test_a_key_that_is_missing_has_the_value_of_transformers_or_is_refused(family: str) -> None:
    complete, accepted = _complete(family), 0
    for key in complete.keys() - {"model_type"}:
        values = {name: value for name, value in complete.items() if name != key}
        found = _read(family, values)
        if isinstance(found, str):
            assert found.endswith(": is missing"), f"{key}: {found}"
            continue
        if family == "deepseek_v3" and key == "num_key_value_heads":
            continue  # latent attention has one for each head, whatever it says
        accepted += 1
        assert found == _read(family, _resolved(family, values)), key
    assert accepted > 5


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("qwen3_moe", "mlp_only_layers", "0"),
        ("qwen3_moe", "mlp_only_layers", ["0"]),
        ("qwen2_moe", "decoder_sparse_step", 0),
        ("dots1", "layer_types", [{}, [], {}, []]),
        ("mixtral", "rope_scaling", {"rope_type": ["yarn"]}),
    ],
)
def test_an_impossible_value_is_refused_by_its_key(family: str, key: str, value: Any) -> None:
    values = {name: value for name, value in _complete(family).items() if name != "rope_parameters"}
    found = _read(family, {**values, key: value})
    assert isinstance(found, str) and found.startswith(("rope_type" if key == "rope_scaling" else key) + ": ")


@pytest.mark.parametrize("change", CHANGES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_unusual_keys_are_read_as_transformers_reads_them_or_refused(family: str, change: dict[str, Any]) -> None:
    values = {**_complete(family), **change}
    found = _read(family, values)
    if isinstance(found, str):
        assert found.split(":")[0] in change, found
    elif "head_dim" not in change or family not in ("gpt_oss", "qwen3"):  # whose head_dim transformers wants
        assert found == _read(family, _resolved(family, values))
