"""JSONL files of metrics."""

import json
import os
import resource
import signal
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from trainer.errors import DataError
from trainer.trackers.jsonl import JsonlSink, read_jsonl


def test_every_record_is_readable_as_soon_as_it_is_written(tmp_path: Path):
    path = tmp_path / "run" / "metrics.jsonl"
    with closing(JsonlSink(path)) as sink:
        for step in (1, 2):
            sink.write({"step": step, "loss": 0.5})
            assert [r["step"] for r in read_jsonl(path)] == list(range(1, step + 1))


def test_not_finite_numbers_become_null_at_any_depth(tmp_path: Path):
    path = tmp_path / "m.jsonl"
    with closing(JsonlSink(path)) as sink:
        sink.write({"loss": float("nan"), "a": [float("inf"), {"b": -float("inf")}, 1.5], "n": np.array([1.0, np.nan])})
    assert "NaN" not in path.read_text() and "Infinity" not in path.read_text()
    assert read_jsonl(path) == [{"loss": None, "a": [None, {"b": None}, 1.5], "n": [1.0, None]}]


def test_numpy_numbers_are_written_as_numbers(tmp_path: Path):
    with closing(JsonlSink(tmp_path / "m.jsonl")) as sink:
        sink.write({"i": np.int64(3), "f": np.float32(0.5), "d": np.float64(0.25), "b": np.bool_(True)})
    assert read_jsonl(tmp_path / "m.jsonl") == [{"i": 3, "f": 0.5, "d": 0.25, "b": True}]


def test_reader_leaves_out_a_line_that_is_still_being_written(tmp_path: Path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')
    assert read_jsonl(path) == [{"step": 1}]


@pytest.mark.parametrize("line", [b"{broken", b"[1]", b"\xff\xfe", b"\0\0"])
def test_reader_names_the_line_that_is_not_a_record(tmp_path: Path, line: bytes):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 2}\n')
    with pytest.raises(DataError, match=r"m\.jsonl:2: is not a JSON object; remove the line"):
        read_jsonl(path)


def test_opening_removes_the_partial_line_of_a_killed_run(tmp_path: Path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    with closing(JsonlSink(path)) as sink:
        sink.write({"step": 2})
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


@pytest.mark.parametrize(("step", "kept"), [(0, []), (10, [10]), (25, [10, 20]), (30, [10, 20, 30])])
def test_resume_drops_later_steps_so_that_no_step_appears_twice(tmp_path: Path, step: int, kept: list[int]):
    path = tmp_path / "m.jsonl"
    path.write_text("".join(json.dumps({"step": s}) + "\n" for s in (10, 20, 30)))
    with closing(JsonlSink(path)) as sink:
        sink.resume_at(step)
        assert [r["step"] for r in read_jsonl(path)] == kept
        sink.write({"step": 40})
    assert [r["step"] for r in read_jsonl(path)] == [*kept, 40]
    assert list(tmp_path.iterdir()) == [path]


def test_resume_drops_evaluations_of_later_steps_and_keeps_records_without_step(tmp_path: Path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"note": 1}\n{"step": 5}\n{"step": 5, "eval/loss": 1.0}\n{"step": 6, "eval/loss": 1.0}\n')
    with closing(JsonlSink(path)) as sink:
        sink.resume_at(5)
    assert read_jsonl(path) == [{"note": 1}, {"step": 5}, {"step": 5, "eval/loss": 1.0}]


def test_resume_drops_partial_and_damaged_lines(tmp_path: Path):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 1}\n\0\0\0\0\n{"step": 2}\n')
    warned: list[str] = []
    with closing(JsonlSink(path, warn=warned.append)) as sink:
        with path.open("ab") as other:
            other.write(b'{"step": 3')
        sink.resume_at(3)
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'
    assert warned == [f"{path}: 1 line is not a record; the run continues without it"]


@pytest.mark.parametrize("before", ['{"step": 1}\n{"step": 2}\n', '{"step": 2}\n{"step": 1}\n'])
def test_a_crash_while_resuming_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str):
    """Both when the end is truncated and when lines in the middle are dropped."""
    path = tmp_path / "m.jsonl"
    path.write_text(before)
    warned: list[str] = []
    with closing(JsonlSink(path, warn=warned.append)) as sink:
        monkeypatch.setattr(Path, "replace", _raise_no_space)
        monkeypatch.setattr(os, "ftruncate", _raise_no_space)
        sink.resume_at(1)
    assert path.read_text() == before
    assert len(warned) == 1


def test_a_full_disk_warns_once_and_leaves_no_partial_record(tmp_path: Path):
    path = tmp_path / "m.jsonl"
    warned: list[str] = []
    with closing(JsonlSink(path, warn=warned.append)) as sink:
        sink.write({"step": 1, "text": "x" * 40})
        with _LargestFile(100):
            for step in (2, 3, 4):
                sink.write({"step": step, "text": "x" * 40})
        sink.write({"step": 5})
    assert [r["step"] for r in read_jsonl(path)] == [1, 5]
    assert len(warned) == 1
    assert str(path) in warned[0] and "training continues" in warned[0]


def test_a_full_disk_is_a_python_warning_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with closing(JsonlSink(tmp_path / "m.jsonl")) as sink:
        monkeypatch.setattr(os, "write", _raise_no_space)
        with pytest.warns(UserWarning, match="No space left on device"):
            sink.write({"step": 1})


def test_a_file_that_cannot_be_opened_is_an_error_at_the_start(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match=r"exists|directory"):
        JsonlSink(tmp_path / "file" / "m.jsonl")


def test_closing_twice_does_nothing(tmp_path: Path):
    sink = JsonlSink(tmp_path / "m.jsonl")
    sink.close()
    sink.close()


def _raise_no_space(*_: object) -> int:
    raise OSError(28, "No space left on device")


class _LargestFile:
    """Let the system shorten a real write, as a full disk does."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes

    def __enter__(self) -> None:
        self.limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        self.handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.num_bytes, self.limits[1]))

    def __exit__(self, *_: object) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self.limits)
        signal.signal(signal.SIGXFSZ, self.handler)


@pytest.mark.parametrize("end", ["\n", '\n{"step": 3, "lo'])
def test_a_snapshot_by_hard_links_is_not_written_through(tmp_path: Path, end: str):
    path, snapshot = tmp_path / "m.jsonl", tmp_path / "snapshot"
    path.write_text('{"step": 1}\n{"step": 2}' + end)
    os.link(path, snapshot)
    with closing(JsonlSink(path)) as sink:
        sink.resume_at(2)
        sink.write({"step": 3, "again": True})
    assert snapshot.read_text() == '{"step": 1}\n{"step": 2}' + end
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3, "again": true}\n'
    assert sorted(tmp_path.iterdir()) == [path, snapshot]


def test_a_snapshot_that_cannot_be_left_alone_is_an_error_that_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n')
    os.link(path, tmp_path / "snapshot")
    monkeypatch.setattr("trainer.atomic_io.shutil.copyfileobj", _raise_no_space)
    with pytest.raises(OSError, match="No space left") as error:
        JsonlSink(path)
    assert error.value.filename == str(path)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("kind", ["link", "pipe", "folder", "device"])
def test_a_path_that_is_not_a_regular_file_is_rejected_and_left_alone(tmp_path: Path, kind: str):
    path, other = tmp_path / "m.jsonl", tmp_path / "other"
    other.write_text("mine")
    match kind:
        case "link":
            path.symlink_to(other)
        case "pipe":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case "device":
            path.symlink_to("/dev/zero")
    with pytest.raises(DataError, match=r"m\.jsonl: is not a regular file; remove it"):
        JsonlSink(path)
    assert other.read_text() == "mine"


def test_resume_drops_a_line_that_is_too_long_or_too_deep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("trainer.metrics.records._MAX_LINE_BYTES", 200_000)
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n' + "[" * 100_000 + '\n{"step": 1, "x": "' + "x" * 500_000 + '"}\n{"step": 2}\n')
    warned: list[str] = []
    with closing(JsonlSink(path, warn=warned.append)) as sink:
        sink.resume_at(2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert warned == [f"{path}: 2 lines are not records; the run continues without them"]


def test_the_removed_partial_line_may_be_long(tmp_path: Path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n' + "x" * 3_000_000)
    JsonlSink(path).close()
    assert path.read_text() == '{"step": 1}\n'
    path.write_text("x" * 3_000_000)
    JsonlSink(path).close()
    assert path.read_text() == ""


def test_truncation_never_writes_through_a_link(tmp_path: Path):
    path, other = tmp_path / "m.jsonl", tmp_path / "other"
    other.write_text("mine")
    path.write_text('{"step": 1}\n{"step": 2}\n')
    (tmp_path / "m.jsonl.tmp").symlink_to(other)
    with closing(JsonlSink(path)) as sink:
        sink.resume_at(1)
    assert path.read_text() == '{"step": 1}\n' and other.read_text() == "mine"
