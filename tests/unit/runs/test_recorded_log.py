"""Tests for reading logs whose lines may be damaged."""

import math
from pathlib import Path

import pytest

from trainer.runs.recorded_log import RecordedLog, finite, read_log


def test_damaged_lines_are_counted_and_a_line_being_written_is_none(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(
        b'{"step": 1, "loss": 2.5}\nnot json\n{"step": "2"}\n[1]\n\xff\xfe\n{"step": 3, "loss": null}\n{"step": 4, "lo'
    )
    log = read_log(path)
    assert [record["step"] for record in log.records] == [1, 3]
    assert (log.damaged, log.last_step, log.newest("loss")) == ([2, 3, 4, 5], 3, 2.5)
    steps, values = log.series("loss")
    assert steps == [1, 3] and values[0] == 2.5 and math.isnan(values[1])


def test_a_log_that_does_not_exist_is_empty_and_a_folder_in_its_place_is_said(tmp_path: Path) -> None:
    assert read_log(tmp_path / "none.jsonl") == RecordedLog(records=[], damaged=[])
    assert read_log(tmp_path).unreadable == "is not a regular file"


@pytest.mark.parametrize("value", [True, "1", None, [1.0], math.inf, math.nan, 1 << 60, 1.7e308])
def test_what_is_no_number_to_reckon_with_is_none(value: object) -> None:
    assert finite({"loss": value}, "loss") is None
