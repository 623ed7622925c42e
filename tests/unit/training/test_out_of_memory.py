"""Tests for the advice in out-of-memory errors."""

import contextlib
import io
from pathlib import Path
from typing import Any, NoReturn

import pytest

from trainer.cli import main
from trainer.errors import MemoryExhausted, explain_out_of_memory

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
PLACES: dict[str, tuple[str, list[str], str]] = {
    "text": (
        "trainer.training.setup.build_corpus",
        [],
        "reading text: {}; lower data.workers, each of which holds a part of it",
    ),
    "weights": (
        "trainer.training.setup.build_model",
        [],
        "making the weights (0.0M parameters in all): {}; " + SMALLER,
    ),
    "dense weights": (
        "trainer.training.setup.build_model",
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
    "step": ("trainer.engine.step.StepEngine.accumulate", [], "taking a step: {}; " + BATCH),
    "step of a row": (
        "trainer.engine.step.StepEngine.accumulate",
        ["parallel.micro_batch_size=1"],
        "taking a step: {}; parallel.micro_batch_size is 1 already: lower model.seq_len, or " + SMALLER,
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
    """Run a command; return its exit code and what it said on standard error."""
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
def test_what_is_advised_helps_there(folder: Path, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, overrides, said = PLACES[place]
    monkeypatch.setattr(name, _refuse)
    assert _train(*overrides) == (7, f"out of memory while {said.format(ALLOCATION)}\n")


def test_a_checkpoint_that_does_not_fit_is_no_matter_of_the_batch(
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
    monkeypatch.setattr("trainer.training.load_trained.build_model", _refuse)
    code, said = _run("generate", "runs/tiny")
    assert (code, said) == (7, f"{read} more memory\n")


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError(ALLOCATION)])
def test_memory_and_nothing_else_is_answered(error: Exception) -> None:
    with (
        pytest.raises(MemoryExhausted, match=r"out of memory while it is tried: .*; do this"),
        explain_out_of_memory("it is tried", "do this"),
    ):
        raise error
    for other in (RuntimeError("no"), MemoryExhausted("told already")):
        with pytest.raises(type(other), match=r"^(no|told already)$"), explain_out_of_memory("it is tried", "do this"):
            raise other
