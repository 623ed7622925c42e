"""Logs as the page reads them."""

import json
from pathlib import Path

from tests.report_samples import sample_report, write_logs
from trainer.report.report_page import report_html
from trainer.report.run_logs import read_run_logs
from trainer.runs.recorded_run import RecordedRun


def test_a_step_that_was_trained_again_has_its_newest_value(tmp_path: Path) -> None:
    run = RecordedRun(write_logs(tmp_path / "run", steps=4))
    with run.folder.metrics.open("a") as file:
        file.writelines(json.dumps({"step": step, "loss": step / 8}) + "\n" for step in (3, 4))
    (log,) = read_run_logs([run])
    curve = log.curve("loss", "loss")
    assert curve.steps == [1, 2, 3, 4]
    assert curve.values[2:] == [0.375, 0.5]


def test_damaged_lines_are_left_out_and_counted(tmp_path: Path) -> None:
    run = RecordedRun(write_logs(tmp_path / "run", steps=4))
    with run.folder.routing.open("a") as file:
        file.write('{"step": 5, "counts": [[1, 2], [3]]}\n{"step": 6, "counts": "x"}\nrubbish\n')
    (log,) = read_run_logs([run])
    assert [step for step, _ in log.counts()] == [1, 2, 3, 4]
    assert "run: 1 damaged lines of routing.jsonl are left out" in report_html([sample_report()], [run])
