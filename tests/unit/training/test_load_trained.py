"""Averaged weights of a run (`--weights ema`) are read as its own are: evaluated, exported, and refused if missing."""

import io
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.tiny_training import config_of_text, final_files, train_here
from trainer.checkpoint.choice import NEWEST, CheckpointChoice
from trainer.checkpoint.run_folder import RunFolder
from trainer.convert.gates import our_logits
from trainer.convert.hf_export import ExportOptions, export
from trainer.convert.peft_adapter import AdapterOptions, export_adapter
from trainer.errors import CheckpointError
from trainer.experiment import ExperimentConfig
from trainer.families.registry import FAMILIES
from trainer.library.runs import Run
from trainer.models.gpt import GPT
from trainer.training.evaluate_run import evaluate_checkpoint, evaluate_top_ks
from trainer.training.load_trained import load_trained

AVERAGED = CheckpointChoice(weights="ema")
OPTIONS = [
    "train.ema.decay=0.5",
    "train.steps=4",
    "model.moe.router={kind: top_k, top_k: 2}",
    "eval.tasks=[{kind: generation, name: add, prompt: '{prompt}', references: ['{answer}'], max_new_tokens: 2, "
    "rows: {kind: jsonl, path: TEXT}}]",
]


def _trained(folder: Path, *overrides: str) -> tuple[ExperimentConfig, RunFolder]:
    """Train a run that an export to mixtral can express."""
    rows = [json.dumps({"prompt": f"{n} times 2 is", "answer": str(2 * n)}) for n in range(2)]
    (folder / "sums.jsonl").write_text("\n".join(rows))
    options = [option.replace("TEXT", str(folder / "sums.jsonl")) for option in OPTIONS]
    config = config_of_text(folder, *options, *overrides)
    train_here(config)
    return config, RunFolder(folder / "runs/tiny")


def _stored(run: RunFolder) -> dict[str, Tensor]:
    """Return all tensors of the last checkpoint, from one rank's file."""
    (files,) = final_files(run.path).values()
    return load_file(max(run.checkpoints.iterdir()) / next(iter(files)))


def _logits(model: GPT) -> Tensor:
    return our_logits(model, torch.arange(60).view(4, 15))


def test_the_average_of_a_run_is_evaluated_and_exported(tmp_path: Path) -> None:
    config, run = _trained(tmp_path)
    stored = _stored(run)
    engine, _, _ = load_trained(config, run, AVERAGED, warn=pytest.fail)
    raw, _, _ = load_trained(config, run, NEWEST, warn=pytest.fail)
    assert engine.average is None and raw.average is not None
    for name, p in engine.model.named_parameters():
        assert torch.equal(p, stored[f"ema.{name}"]) and not torch.equal(p, stored[f"model.{name}"]), name
    for name, buffer in engine.model.named_buffers():
        assert torch.equal(buffer, stored[f"model.{name}"]), name
    own, average = (
        evaluate_checkpoint(config, run, choice=choice, only=None, screen=io.StringIO())
        for choice in (NEWEST, AVERAGED)
    )
    assert "weights" not in own and average["weights"] == "ema"
    assert not any("/ema/" in key for key in average)
    assert {k: v for k, v in average.items() if k.startswith("eval/") and k.replace("eval/", "eval/ema/") in own} == {
        key.replace("/ema/", "/"): value for key, value in own.items() if "/ema/" in key
    }
    screen = io.StringIO()
    assert evaluate_top_ks(config, run, [1], choice=AVERAGED, screen=screen)["weights"] == "ema"
    assert "tiny at step 4, averaged weights" in screen.getvalue()
    assert torch.equal(_logits(Run(run.path).model(weights="ema")), _logits(engine.model))

    export(config, run, tmp_path / "out", ExportOptions(family=FAMILIES["mixtral"], choice=AVERAGED), warn=pytest.fail)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    expected = _logits(engine.model)
    torch.testing.assert_close(theirs(torch.arange(60).view(4, 15)).logits, expected, rtol=0, atol=1e-5)
    assert float((_logits(raw.model) - expected).detach().abs().max()) > 1e-3
    card = (tmp_path / "out/README.md").read_text()
    assert "| weights | the moving average" in card and f"{own['eval/ema/loss']:.2f}" in card


def test_adapters_are_averaged_and_what_did_not_learn_is_as_it_was(tmp_path: Path) -> None:
    config, run = _trained(tmp_path, "model.lora={rank: 2, alpha: 4.0}")
    stored = _stored(run)
    engine, _, _ = load_trained(config, run, AVERAGED, warn=pytest.fail)
    for name, p in engine.model.named_parameters():
        assert torch.equal(p, stored[f"ema.{name}" if f"ema.{name}" in stored else f"model.{name}"]), name
    export(config, run, tmp_path / "out", ExportOptions(family=FAMILIES["mixtral"], choice=AVERAGED), warn=pytest.fail)
    options = AdapterOptions(family=FAMILIES["mixtral"], choice=AVERAGED)
    export_adapter(config, run, tmp_path / "adapter", options, warn=pytest.fail)
    factors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    factor = factors["base_model.model.model.layers.0.self_attn.o_proj.lora_B.weight"]
    assert any(torch.equal(factor, tensor) for name, tensor in stored.items() if name.startswith("ema.blocks.0."))


def test_a_run_without_an_average_says_so(tmp_path: Path) -> None:
    config, run = _trained(tmp_path, "train.ema=null")
    with pytest.raises(CheckpointError, match=r"step_00000004: has no moving average of its weights; .*train\.ema"):
        load_trained(config, run, AVERAGED, warn=pytest.fail)


def test_a_damaged_checkpoint_that_is_named_says_what_to_do(tmp_path: Path) -> None:
    config, run = _trained(tmp_path, "train.ema=null", "train.steps=2", "eval.tasks=[]")
    (file,) = max(run.checkpoints.iterdir()).glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-5] ^= 4
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"is damaged \(its SHA-256 .*; use the checkpoint of another step"):
        load_trained(config, run, CheckpointChoice(step=2), warn=pytest.fail)
    with pytest.raises(CheckpointError, match=r"has no checkpoint of step 7; it has 2$"):
        load_trained(config, run, CheckpointChoice(step=7), warn=pytest.fail)
