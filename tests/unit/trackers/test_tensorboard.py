"""Event files, read by TensorBoard."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trainer.trackers.tensorboard import TensorBoardTracker


def _open(folder: Path, start_step: int = 0, warn: Callable[[str], None] = pytest.fail) -> TensorBoardTracker:
    return TensorBoardTracker(
        folder, start_step=start_step, heatmap_every=2, moe_layers=[3], config_text="seed: 1", warn=warn
    )


def _train(tracker: TensorBoardTracker, steps: range, loss: float) -> None:
    for step in steps:
        tracker.log({"step": step, "loss": loss, "mfu": None}, {"step": step, "counts": [[step, 0]]})


def _read(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={"histograms": 0}).Reload()


def test_repeated_steps_replace_earlier_ones(tmp_path: Path):
    killed = _open(tmp_path)
    _train(killed, range(1, 8), loss=1.0)  # and not closed
    resumed = _open(tmp_path, start_step=4)
    _train(resumed, range(5, 10), loss=2.0)
    resumed.log({"step": 9, "eval/loss": 0.5})
    assert resumed.written() == [("tensorboard", str(tmp_path))]
    resumed.close(0, patience_s=10.0)
    found = _read(tmp_path)
    assert [(e.step, e.value) for e in found.Scalars("loss")] == [(s, 1.0 if s < 5 else 2.0) for s in range(1, 10)]
    assert [(e.step, e.value) for e in found.Scalars("eval/loss")] == [(9, 0.5)]
    assert found.Tags()["scalars"] == ["loss", "eval/loss"]
    killed.close(1, patience_s=0.0)


def test_the_loads_of_a_layer_are_a_histogram_over_the_expert_index(tmp_path: Path):
    tracker = _open(tmp_path)
    _train(tracker, range(1, 4), loss=1.0)
    tracker.close(0, patience_s=10.0)
    rows = _read(tmp_path).Histograms("load/layer_03")
    assert [row.step for row in rows] == [1, 3]
    assert (rows[0].histogram_value.bucket_limit, rows[0].histogram_value.bucket) == ([1.0, 2.0], [2.0, 0.0])


def test_a_folder_that_cannot_be_written_only_warns(tmp_path: Path):
    (tmp_path / "file").write_text("")
    warnings: list[str] = []
    tracker = _open(tmp_path / "file", warn=warnings.append)
    _train(tracker, range(1, 3), loss=1.0)
    assert tracker.written() == []
    tracker.close(0, patience_s=10.0)
    (warning,) = warnings
    assert "TensorBoard logging is off: " in warning and "metrics.jsonl is complete" in warning


def test_a_disk_that_fills_up_only_warns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    warnings: list[str] = []
    tracker = _open(tmp_path, warn=warnings.append)
    writer = tracker._writer
    assert writer is not None

    def refuse() -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "flush", refuse)
    _train(tracker, range(1, 4), loss=1.0)
    tracker.close(0, patience_s=10.0)
    assert len(warnings) == 1 and "No space left on device" in warnings[0]


def test_a_folder_removed_during_the_run_gets_later_records(tmp_path: Path):
    tracker = _open(tmp_path / "tensorboard")
    _train(tracker, range(1, 4), loss=1.0)
    shutil.rmtree(tmp_path / "tensorboard")
    _train(tracker, range(4, 7), loss=2.0)
    tracker.close(0, patience_s=10.0)
    found = _read(tmp_path / "tensorboard")
    assert [(e.step, e.value) for e in found.Scalars("loss")] == [(step, 2.0) for step in range(4, 7)]
