"""Tests for check_memory: a run that cannot fit is refused before anything is allocated."""

import re
from typing import Any

import pytest
import torch

from trainer.distributed.rank_layout import Layout
from trainer.errors import ResourceError
from trainer.experiment import ExperimentConfig
from trainer.metrics import system_stats
from trainer.metrics.system_stats import total_memory
from trainer.training import memory
from trainer.training.memory import check_memory

CPU = torch.device("cpu")
MODEL = {"num_layers": 2, "d_model": 8, "num_heads": 2, "d_ff": 16, "seq_len": 32, "tie_embeddings": True}
DENSE = 2 * (3 * 64 + 64 + 2 * 8) + 8 + 256 * 8
"""Weights of attention, norms and embedding."""
EXPERT = 2 * 3 * 8 * 4
ROWS = 32 * (2 * 8 + 256)
"""Numbers that are kept of one row."""


def _config(**sections: Any) -> ExperimentConfig:
    sections = {"train": {"global_batch_size": 8}, "parallel": {"micro_batch_size": 4}, **sections}
    moe = {"num_experts": 6, "d_ff": 4}
    return ExperimentConfig.model_validate({"name": "x", "model": {**MODEL, "moe": moe}, **sections})


CASES = {
    "one process": (_config(), Layout(), 16 * (DENSE + 6 * EXPERT) + 2 * 4 * ROWS + 50 * 8 * 32),
    "in float64": (
        _config(train={"global_batch_size": 8, "dtype": "float64"}),
        Layout(),
        32 * (DENSE + 6 * EXPERT) + 4 * 4 * ROWS + 50 * 8 * 32,
    ),
    "experts over three of six ranks, two of them here": (
        _config(parallel={"micro_batch_size": 4, "ep_size": 3}),
        Layout(world_size=6, ep_size=3, ranks_per_node=2),
        2 * (16 * (DENSE + 2 * EXPERT) + 2 * 2 * ROWS + 50 * 2 * 32),
    ),
    "sharded": (
        _config(parallel={"micro_batch_size": 4, "data": "shard"}),
        Layout(),
        4 * (DENSE + 6 * EXPERT) + 2 * 4 * ROWS + 50 * 8 * 32,
    ),
    "a larger vocabulary": (
        _config(data={"tokenizer": {"kind": "bpe", "vocab_size": 512}}),
        Layout(),
        16 * (DENSE + 256 * 8 + 6 * EXPERT) + 2 * 4 * (ROWS + 32 * 256) + 50 * 8 * 32,
    ),
}


@pytest.mark.parametrize(("config", "layout", "needed"), CASES.values(), ids=CASES.keys())
def test_what_is_needed_fits_and_a_byte_less_is_refused(
    config: ExperimentConfig, layout: Layout, needed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "total_memory", lambda device: needed)
    check_memory(config, layout, CPU)
    monkeypatch.setattr(memory, "total_memory", lambda device: needed - 1)
    with pytest.raises(ResourceError, match=r"x: .* at least"):
        check_memory(config, layout, CPU)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        (
            {"model": {"num_layers": 1, "d_model": 2**18, "num_heads": 2, "moe": None}},
            r"needs at least 4\.41 TB of memory \(4\.41 TB for weights with gradients and moments\), and "
            r"16\.0 GB is available; lower model\.d_model, model\.num_layers or the experts",
        ),
        (
            {"model": {**MODEL, "seq_len": 2**27}},
            r"for activations of one micro-batch\), .*; lower parallel\.micro_batch_size or model\.seq_len",
        ),
        (
            {"model": MODEL, "train": {"global_batch_size": 2**24}, "parallel": {"micro_batch_size": 1}},
            r"for rows of one step\), .*; lower train\.global_batch_size or model\.seq_len",
        ),
    ],
)
def test_what_needs_the_most_is_named_with_the_key_that_lowers_it(
    sections: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "total_memory", lambda device: 16 * 10**9)
    with pytest.raises(ResourceError) as caught:
        check_memory(_config(**sections), Layout(), CPU)
    assert re.search(said, str(caught.value)), str(caught.value)
    assert caught.value.exit_code == 7


def test_a_container_s_limit_counts(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:

    whole = total_memory(CPU)
    (tmp_path / "max").write_text("max\n")
    (tmp_path / "limit").write_text(f"{1 << 20}\n")
    monkeypatch.setattr(system_stats, "_LIMITS", (tmp_path / "missing", tmp_path / "max"))
    assert total_memory(CPU) >= whole > 1 << 20
    monkeypatch.setattr(system_stats, "_LIMITS", (tmp_path / "max", tmp_path / "limit"))
    assert total_memory(CPU) == 1 << 20
