"""The public interface without a run: what it imports, and how it reads a run folder."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import trainer
from tests.launched_ranks import ROOT
from trainer import build_model, load_batches, load_config, load_run, train
from trainer.config.dump import dump
from trainer.errors import CheckpointError, ConfigError

RECORDS = [
    {"step": 1, "loss": 5.0, "lr": 0.1},
    {"step": 2, "loss": 4.0, "lr": 0.2},
    {"step": 2, "eval/loss": 4.5, "note": None},
]


def test_importing_it_imports_neither_torch_nor_pydantic() -> None:
    code = "import sys, trainer; print(sorted({'torch', 'pydantic', 'numpy'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_every_public_name_can_be_imported() -> None:
    for name in trainer.__all__:
        assert getattr(trainer, name).__doc__
        assert name in dir(trainer)
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        _ = trainer.nope  # type: ignore[attr-defined]


def test_a_config_is_loaded_with_overrides() -> None:
    assert load_config(ROOT / "configs/smoke.yaml", ["train.steps=7"]).train.steps == 7
    with pytest.raises(ConfigError, match="unknown key"):
        load_config(ROOT / "configs/smoke.yaml", ["train.stepz=7"])


def test_a_config_is_loaded_by_its_name_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config("smoke") == load_config(ROOT / "configs/smoke.yaml")
    with pytest.raises(ConfigError, match="no such file, and no config of the package"):
        load_config("smokey")
    with pytest.raises(ConfigError, match="cannot be read: File name too long"):
        load_config("x" * 300)
    with pytest.raises(TypeError, match="path: expected a path or a name such as 'smoke', got None"):
        load_config(None)  # type: ignore[arg-type]


def test_a_config_is_loaded_from_a_run_folder(folder: Path) -> None:
    assert load_config(folder, ["train.steps=7"]).train.steps == 7


@pytest.mark.parametrize("overrides", ["train.steps=3", [3], None])
def test_overrides_that_are_no_list_of_texts_are_refused(overrides: Any) -> None:
    with pytest.raises(TypeError, match="overrides: expected a list of texts"):
        load_config("smoke", overrides)


@pytest.mark.parametrize("function", [train, build_model, load_batches])
def test_a_name_in_place_of_a_config_is_refused(function: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match=r"config: expected an ExperimentConfig, got str; write load_config\('smoke'\)"):
        function("smoke")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    lines = [*map(json.dumps, RECORDS), '{"step": 3, "lo']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    (tmp_path / "config.yaml").write_text(dump(load_config(ROOT / "configs/smoke.yaml")))
    return tmp_path


def test_metrics_are_records_and_series(folder: Path) -> None:
    run = load_run(folder)
    assert list(run.metrics()) == RECORDS
    steps, losses = run.series("loss")
    np.testing.assert_array_equal(steps, [1, 2])
    np.testing.assert_array_equal(losses, [5.0, 4.0])
    assert run.series("eval/loss")[1].tolist() == [4.5]
    with pytest.raises(KeyError, match="no metric 'los'; it has step, loss, lr, eval/loss, note"):
        run.series("los")
    assert (run.config.name, run.checkpoints, list(run.routing())) == ("smoke", [], [])


def test_a_damaged_line_is_left_out_with_a_warning(folder: Path) -> None:
    path = folder / "metrics.jsonl"
    path.write_text("{not json\n" + path.read_text())
    with pytest.warns(UserWarning, match=r"metrics\.jsonl: line 1 is damaged"):
        assert list(load_run(folder).metrics()) == RECORDS


def test_another_folder_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no config\.yaml, so it is not a run folder"):
        load_run(tmp_path)
