"""A run with a moving average of its weights: what is logged, resumed, and evaluated again later."""

import io
import json
from pathlib import Path

import pytest

from tests.tiny_training import config_of, config_of_text, final_files, kill_after, losses, train_here
from trainer.checkpoint.choice import NEWEST
from trainer.checkpoint.run_folder import RunFolder
from trainer.errors import ConfigError
from trainer.training.evaluate_run import evaluate_checkpoint

EMA = ["train.ema.decay=0.5", "eval.every=4"]


def test_a_run_evaluates_its_average_too_and_resumes_with_it(tmp_path: Path) -> None:
    config, run = config_of_text(tmp_path, *EMA), tmp_path / "runs/tiny"
    screen = train_here(config)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evaluated = [record for record in records if "eval/loss" in record]
    assert [record["step"] for record in evaluated] == [4, 8, 12]
    of_average = {key.removeprefix("eval/") for key in evaluated[-1] if key.startswith("eval/") and "ema" not in key}
    assert {key.removeprefix("eval/ema/") for key in evaluated[-1] if "/ema/" in key} == of_average
    assert all(record["eval/ema/loss"] != record["eval/loss"] for record in evaluated)
    assert f"ema {evaluated[0]['eval/ema/loss']:.3f}" in screen
    whole = evaluate_checkpoint(config, RunFolder(run), choice=NEWEST, only=None, screen=io.StringIO())
    assert whole["eval/ema/loss"] == pytest.approx(evaluated[-1]["eval/ema/loss"], rel=1e-6)
    files = final_files(run)
    kill_after(run, 6)
    train_here(config)
    assert final_files(run) == files


def test_without_evaluations_of_the_average_a_run_learns_the_same(tmp_path: Path) -> None:
    train_here(config_of_text(tmp_path, *EMA))
    train_here(config_of_text(tmp_path, "name=plain"))
    assert losses(tmp_path / "runs/tiny") == losses(tmp_path / "runs/plain")
    config = config_of_text(tmp_path, *EMA, "name=later", "init_from.run=" + str(tmp_path / "runs/plain"))
    train_here(config)  # a first checkpoint without averages
    manifest = json.loads((tmp_path / "runs/later/checkpoints/step_00000012/manifest.json").read_text())
    assert "ema.head.weight" in manifest["tensors"]


def test_a_domain_may_not_have_the_name_of_its_results(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a domain or task is named ema"):
        config_of(tmp_path, *EMA, "data.sources=[{kind: text, domain: ema, path: x.txt}]")
    with pytest.raises(ConfigError, match=r"the first update is after step 20, and train\.steps is 12"):
        config_of(tmp_path, "train.ema.every=20")
