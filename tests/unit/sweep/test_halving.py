"""Successive halving: rungs, survivors, and runs that go on as if they had never stopped."""

import json
from pathlib import Path

import pytest

from tests.sweep_outcomes import outcome, places
from tests.tiny_training import CONFIG, config_of, train_here
from trainer.sweep.halving import rungs, survivors
from trainer.sweep.plan_trials import plan_sweep
from trainer.sweep.run_sweep import run_sweep
from trainer.sweep.sweep_config import GridConfig, HalvingConfig

SWEEP = """\
name: halve
config: tiny.yaml
over: {model.moe.router.scale: [0.5, 1.0, 2.0, 4.0]}
method: {kind: halving, first_steps: 2, eta: 2}
"""


def test_rungs_grow_by_eta_and_end_with_the_training() -> None:
    assert rungs(HalvingConfig(first_steps=3, eta=3), 100) == [3, 9, 27, 81, 100]
    assert rungs(HalvingConfig(first_steps=5, eta=2), 20) == [5, 10, 20]
    assert rungs(GridConfig(), 20) == [20]


def test_the_best_of_those_without_a_failure_go_on() -> None:
    rung = [outcome("a", 3.0), outcome("b", 1.0), outcome("c", 2.0), outcome("d", 0.5, trials=2), outcome("e", 4.0)]
    for eta, maximize, names in ((2, False, "bc"), (2, True, "ae"), (3, False, "b"), (9, False, "b")):
        assert "".join(one.name for one in survivors(rung, eta=eta, maximize=maximize)) == names
    assert survivors([outcome("d", 0.5, trials=2)], eta=2, maximize=False) == []


def test_a_run_that_stopped_after_a_step_ends_like_one_that_did_not(tmp_path: Path) -> None:
    here = places(tmp_path)
    whole, parted = (
        config_of(tmp_path, *here, "name=whole"),
        config_of(tmp_path, *here, "name=parted", "train.stop_after=5"),
    )
    train_here(whole)
    assert "stopped by train.stop_after after step 5: saved" in train_here(parted)
    assert "already at step 5: train.stop_after is 5" in train_here(parted)
    folders = [Path(config.runs_dir) / config.name for config in (whole, parted)]
    records = [json.loads(line) for line in (folders[1] / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["step"] == 5 and records[-1]["eval/loss"] > 0
    train_here(config_of(tmp_path, *here, "name=parted"))
    files = [sorted((folder / "checkpoints/step_00000012").glob("*.safetensors")) for folder in folders]
    assert [path.read_bytes() for path in files[0]] == [path.read_bytes() for path in files[1]] != []
    with pytest.raises(Exception, match="12 is not before the end, steps 12"):
        config_of(tmp_path, "train.stop_after=12")


def test_each_rung_keeps_the_best_by_the_metric_at_its_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Trained in this process: the sweep finds what it would have trained."""
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    (tmp_path / "s.yaml").write_text(SWEEP)
    here = places(tmp_path)
    left, losses = [f"scale-{scale}" for scale in (0.5, 1.0, 2.0, 4.0)], {}
    for until in (2, 4, 12):
        for trial in plan_sweep(tmp_path / "s.yaml", here).trials:
            if trial.candidate.name in left:
                stop_after = {"stop_after": None if until == 12 else until}
                train = trial.config.train.model_copy(update=stop_after)
                train_here(trial.config.model_copy(update={"train": train}))
                lines = trial.folder.metrics.read_text().splitlines()
                losses[trial.candidate.name] = json.loads(lines[-1])["eval/loss"]
        left = sorted(left, key=lambda name: losses[name])[: len(left) // 2] or left
    sweep = plan_sweep(tmp_path / "s.yaml", here)
    assert run_sweep(sweep) == 0
    record = json.loads((sweep.folder / "sweep.json").read_text())
    assert {one["name"]: one["mean"] for one in record["candidates"]} == losses
    assert sorted(one["steps"] for one in record["candidates"]) == [2, 2, 4, 12]
    assert record["recommended"]["name"] == left[0]
    assert "after step 4 of 12" in capsys.readouterr().out
