"""Tests for the memory check and the advice in out-of-memory errors."""

import contextlib
import io
import re
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from trainer.cli import main
from trainer.distributed.rank_layout import Layout
from trainer.errors import MemoryExhausted, ResourceError, explain_out_of_memory
from trainer.experiment import ExperimentConfig
from trainer.metrics import system_stats
from trainer.metrics.system_stats import total_memory
from trainer.training import memory
from trainer.training.memory import check_memory

CPU = torch.device("cpu")
MODEL = {"num_layers": 2, "d_model": 8, "num_heads": 2, "d_ff": 16, "seq_len": 32, "tie_embeddings": True}
DENSE = 2 * (3 * 64 + 64 + 2 * 8) + 8 + 256 * 8
"""Weights of attention, norms and embedding."""
CUT = 2 * (3 * 64 + 64)
"""Those of them that tensor-parallel ranks cut."""
EXPERT = 2 * 3 * 8 * 4
ROWS = 32 * (2 * 8 + 256)
"""Activations per row."""


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
    "with copies of two experts, in two bytes a weight": (
        _config(parallel={"micro_batch_size": 4, "ep_size": 3, "replicas": 2}),
        Layout(world_size=6, ep_size=3, ranks_per_node=2),
        2 * (16 * (DENSE + 2 * EXPERT) + 2 * 2 * EXPERT + 2 * 2 * ROWS + 50 * 2 * 32),
    ),
    "sharded over eight ranks": (
        _config(parallel={"micro_batch_size": 4, "data": "shard", "ep_size": 2}),
        Layout(world_size=8, ep_size=2),
        16 * (DENSE // 8 + 3 * EXPERT // 4) + 2 * ROWS + 50 * 32,
    ),
    "frozen weights are alone": (
        _config(train={"global_batch_size": 8, "freeze": ["experts", "embedding", "head", "router"]}),
        Layout(),
        16 * (DENSE - 256 * 8) + 4 * (256 * 8 + 6 * EXPERT) + 2 * 4 * ROWS + 50 * 8 * 32,
    ),
    "with an average of what learns": (
        _config(train={"global_batch_size": 8, "freeze": ["embedding", "head", "router"], "ema": {}}),
        Layout(),
        20 * (DENSE - 256 * 8 + 6 * EXPERT) + 4 * 256 * 8 + 2 * 4 * ROWS + 50 * 8 * 32,
    ),
    "sharded inside groups of four": (
        _config(parallel={"micro_batch_size": 4, "data": "shard", "ep_size": 2, "shard_size": 4}),
        Layout(world_size=8, ep_size=2, shard_size=4),
        16 * (DENSE // 4 + 3 * EXPERT // 2) + 2 * ROWS + 50 * 32,
    ),
    "in two stages": (
        _config(parallel={"micro_batch_size": 4, "ep_size": 2, "pp_size": 2}),
        Layout(world_size=4, ep_size=2, pp_size=2),
        16 * (DENSE + 3 * EXPERT) // 2 + 2 * 4 * ROWS // 2 + 50 * 4 * 32,
    ),
    "heads over two ranks": (
        _config(parallel={"micro_batch_size": 4, "tp_size": 2}),
        Layout(world_size=2, tp_size=2),
        16 * (DENSE - CUT + CUT // 2 + 6 * EXPERT) + 2 * 4 * ROWS // 2 + 50 * 8 * 32 // 2,
    ),
    "sharded heads over two of eight ranks": (
        _config(parallel={"micro_batch_size": 4, "tp_size": 2, "ep_size": 2, "data": "shard"}),
        Layout(world_size=8, tp_size=2, ep_size=2),
        16 * ((DENSE - CUT) // 8 + CUT // 2 // 4 + 3 * EXPERT // 4) + 2 * 2 * ROWS // 2 + 50 * 2 * 32 // 2,
    ),
    "a larger vocabulary": (
        _config(data={"tokenizer": {"kind": "bpe", "vocab_size": 512}}),
        Layout(),
        16 * (DENSE + 256 * 8 + 6 * EXPERT) + 2 * 4 * (ROWS + 32 * 256) + 50 * 8 * 32,
    ),
}


@pytest.mark.parametrize(("config", "layout", "needed"), CASES.values(), ids=CASES.keys())
def test_memory_is_checked_to_the_byte(
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
            {"model": {**MODEL, "seq_len": 2**27}, "parallel": {"loss_chunk": None}},
            r"for activations of one micro-batch\), .*; lower parallel\.micro_batch_size or model\.seq_len",
        ),
        (
            {"model": MODEL, "train": {"global_batch_size": 2**24}, "parallel": {"micro_batch_size": 1}},
            r"for rows of one step\), .*; lower train\.global_batch_size or model\.seq_len",
        ),
    ],
)
def test_the_largest_part_is_named_with_the_keys_that_lower_it(
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


# --- advice -----------------------------------------------------------------------------------------------------------

CONFIG = """\
name: tiny
model: {num_layers: 1, d_model: 8, num_heads: 2, seq_len: 8, d_ff: 8, moe: {num_experts: 2, d_ff: 8}}
train: {steps: 2, global_batch_size: 4}
eval: {max_tokens_per_domain: 64}
schedule: {kind: warmup_cosine, warmup_steps: 0}
"""
SMALLER = (
    "make the model smaller (model.moe.num_experts, model.moe.d_ff, model.d_model, model.num_layers), or share its "
    "experts among more ranks (parallel.ep_size)"
)
BATCH = "lower parallel.micro_batch_size, which is 4"
AGAIN = "set parallel.recompute: block"
PLACES: dict[str, tuple[str, list[str], str]] = {
    "text": (
        "trainer.training.setup.corpus_of_run",
        [],
        "reading text: {}; lower data.workers, each of which holds a part of it",
    ),
    "weights": (
        "trainer.training.setup.build_parallel_model",
        [],
        "making the weights (0.0M parameters in all): {}; " + SMALLER,
    ),
    "dense weights": (
        "trainer.training.setup.build_parallel_model",
        ["model.moe=null"],
        "making the weights (0.0M parameters in all): {}; make the model smaller (model.d_model, model.d_ff, "
        "model.num_layers)",
    ),
    "engine": (
        "trainer.engine.native.NativeEngine.__init__",
        [],
        "making the optimizer state, two numbers per weight: {}; shard it over more ranks (parallel.data: shard), "
        f"or {SMALLER}",
    ),
    "moments": (
        "trainer.engine.native.NativeEngine._state_of",
        ["parallel.data=shard"],
        "making the optimizer state, two numbers per weight: {}; " + SMALLER,
    ),
    "step": ("trainer.engine.step.StepEngine.accumulate", [], f"taking a step: {{}}; {BATCH}, or {AGAIN}"),
    "step of a row": (
        "trainer.engine.step.StepEngine.accumulate",
        ["parallel.micro_batch_size=1"],
        f"taking a step: {{}}; parallel.micro_batch_size is 1 already: {AGAIN}, lower model.seq_len, or {SMALLER}",
    ),
    "step that recomputes": (
        "trainer.engine.step.StepEngine.accumulate",
        ["parallel.recompute=block"],
        "taking a step: {}; " + BATCH,
    ),
    "evaluation": ("trainer.training.evaluate_run.evaluate_held_out", [], "evaluating the model: {}; " + BATCH),
    "save": (
        "trainer.checkpoint.saver.Saver._copy",
        [],
        "copying the state to save it: {}; set checkpoint.asynchronous: false, which makes no copy of it",
    ),
    "save without a copy": (
        "trainer.checkpoint.saver.Saver._copy",
        ["checkpoint.asynchronous=false"],
        "copying the state to save it: {}; " + SMALLER,
    ),
}
ALLOCATION = "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "text.txt").write_text("It was a bright cold day in April, and the clocks were striking. " * 50)
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _run(*words: str) -> tuple[int, str]:
    """Run a command; return its exit code and its standard error."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()), pytest.raises(SystemExit) as end:
        main(words)
    return int(end.value.code or 0), said.getvalue()


def _train(*overrides: str) -> tuple[int, str]:
    source = "data.sources=[{kind: text, path: text.txt, domain: prose}]"
    return _run("train", "tiny.yaml", source, "parallel.micro_batch_size=4", *overrides)


def _refuse(*_: Any, **__: Any) -> NoReturn:
    raise RuntimeError(f"{ALLOCATION}\nand how")


@pytest.mark.parametrize("place", PLACES)
def test_each_phase_has_its_own_advice(folder: Path, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, overrides, said = PLACES[place]
    monkeypatch.setattr(name, _refuse)
    assert _train(*overrides) == (7, f"out of memory while {said.format(ALLOCATION)}\n")


def test_running_out_of_memory_while_reading_a_checkpoint_is_explained(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _train()[0] == 0
    read = (
        f"out of memory while reading a checkpoint: {ALLOCATION}; use more ranks (parallel.ep_size), or a machine with"
    )
    monkeypatch.setattr("trainer.training.resume.StoredTensors.read", _refuse)
    assert _train("train.steps=3") == (7, f"{read} more memory\n")
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    monkeypatch.setattr("trainer.training.load_trained.build_parallel_model", _refuse)
    code, said = _run("generate", "runs/tiny")
    assert (code, said) == (7, f"{read} more memory\n")


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError(ALLOCATION)])
def test_only_out_of_memory_errors_are_explained(error: Exception) -> None:
    with (
        pytest.raises(MemoryExhausted, match=r"out of memory while it is tried: .*; do this"),
        explain_out_of_memory("it is tried", "do this"),
    ):
        raise error
    for other in (RuntimeError("no"), MemoryExhausted("told already")):
        with pytest.raises(type(other), match=r"^(no|told already)$"), explain_out_of_memory("it is tried", "do this"):
            raise other
