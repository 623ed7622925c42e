"""A run that stops early: when, with what checkpoint, and that it does not go on by itself."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import Ranks, mesh_here
from tests.tiny_training import config_of_text, final_files, kill_after, train_here
from trainer.checkpoint.checkpoint_folder import CheckpointFolder
from trainer.engine.config import EarlyStoppingConfig
from trainer.training.early_stopping import EarlyStopping

STOPS = [
    "train.steps=30", "eval.every=3", "eval.max_tokens_per_domain=16", "checkpoint.every=5", "checkpoint.keep=20",
    "train.early_stopping={patience: 2, mode: max}",
]  # fmt: skip
"""The loss falls, so that the greatest is the first one, after step 3; two more evaluations are after step 9."""


def _stops_after(values: list[float], **fields: Any) -> int | None:
    stopping = EarlyStopping(EarlyStoppingConfig(**fields))
    for number, value in enumerate(values, start=1):
        stopping.note(number, {"eval/loss": value})
        if stopping.is_over:
            return number
    return None


def test_it_is_over_after_so_many_evaluations_without_a_better_one() -> None:
    values = [5.0, 4.0, 4.0, 3.9, 4.0, math.nan, 3.0]
    assert _stops_after(values, patience=1) == 3, "an equal value is no better"
    assert _stops_after(values, patience=2) == 6, "nor is one that is not finite"
    assert _stops_after(values, patience=3) is None
    assert _stops_after(values, patience=2, min_delta=0.2) == 4
    assert _stops_after(values, patience=2, mode="max") == 3
    assert _stops_after([math.nan, math.inf], patience=2) == 2
    stopping = EarlyStopping(EarlyStoppingConfig(patience=1))
    stopping.note(1, {"eval/other": 1.0})
    assert not stopping.is_over and not EarlyStopping(None).is_over and EarlyStopping(None).record() == {}


@pytest.mark.parametrize(
    "changes", [{"waited": -1}, {"waited": "9"}, {"best": math.nan}, {"best": "1"}, {"step": None}, {"mode": "max"}]
)
def test_a_malformed_record_or_one_of_another_metric_begins_anew(changes: dict[str, Any]) -> None:
    before = EarlyStopping(EarlyStoppingConfig(patience=1))
    before.note(1, {"eval/loss": 1.0})
    before.note(2, {"eval/loss": 2.0})
    whole, changed = (EarlyStopping(EarlyStoppingConfig(patience=1)) for _ in range(2))
    record = before.record()["early_stopping"]
    whole.restore({"early_stopping": record})
    changed.restore({"early_stopping": {**record, **changes}})
    assert whole.is_over and not changed.is_over


def _train_on_ranks(folder: Path) -> None:
    layout = ["parallel.ep_size=2", "parallel.dispatcher.kind=all_to_all", "train.steps=8"]
    train_here(config_of_text(folder, *STOPS, *layout), mesh_here(ep_size=2))


def _last(run: Path) -> int:
    return CheckpointFolder(run / "checkpoints").steps()[-1]


def test_a_run_stops_with_a_checkpoint_says_why_and_does_not_go_on(tmp_path: Path) -> None:
    run, config = tmp_path / "runs/tiny", config_of_text(tmp_path, *STOPS)
    screen = train_here(config)
    assert _last(run) == 9
    assert "stopped early after step 9: 2 evaluations in a row have no better eval/loss" in screen
    files, log = final_files(run), (run / "metrics.jsonl").read_bytes()
    assert "already stopped early after step 9" in train_here(config)
    assert (final_files(run), (run / "metrics.jsonl").read_bytes()) == (files, log)
    kill_after(run, 5)  # one evaluation is in the record of the checkpoint
    train_here(config)
    assert final_files(run) == files
    screen = train_here(config_of_text(tmp_path, *STOPS[:-1], "train.early_stopping={patience: 3, mode: max}"))
    assert _last(run) == 12 and "after step 12: 3 evaluations" in screen
    train_here(config_of_text(tmp_path, *STOPS[:-1]))
    assert _last(run) == 30
    plain = config_of_text(tmp_path, *STOPS[:-1], "name=plain")
    train_here(plain)
    assert final_files(run) == final_files(tmp_path / "runs/plain"), "on the way nothing else was changed"
    manifest = json.loads((tmp_path / "runs/plain/checkpoints/step_00000030/manifest.json").read_text())
    assert "early_stopping" not in manifest["run"]


def test_it_is_counted_in_any_layout(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(2, _train_on_ranks, tmp_path)  # two evaluations, and the one at the end of 8 steps
    screen = train_here(config_of_text(tmp_path, *STOPS))
    assert "already stopped early after step 8" in screen and _last(tmp_path / "runs/tiny") == 8
