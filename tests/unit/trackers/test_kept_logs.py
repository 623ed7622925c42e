"""Logs that are damaged, removed, replaced or written by others: little is lost, and nothing silently."""

import json
import os
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from trainer.metrics import records
from trainer.metrics.log_content import LogContent
from trainer.metrics.records import loss_curve, parse_record
from trainer.trackers.base import JsonlTracker
from trainer.trackers.jsonl import JsonlSink, read_jsonl


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run/m.jsonl"


@pytest.fixture
def warned() -> list[str]:
    return []


@pytest.fixture
def sink(path: Path, warned: list[str]) -> Iterator[JsonlSink]:
    """Return a log of ten steps."""
    sink = JsonlSink(path, warn=warned.append)
    sink.resume_at(0)
    _write(sink, range(1, 11))
    yield sink
    sink.close()


def _write(sink: JsonlSink, steps: range) -> None:
    for step in steps:
        sink.write({"step": step, "loss": 1.5})


def _steps(path: Path) -> list[int]:
    return [record["step"] for record in read_jsonl(path)]


# --- while a run writes ------------------------------------------------------------------------------------------


def test_a_removed_log_is_restored_with_the_next_record(path: Path, sink: JsonlSink, warned: list[str]):
    path.unlink()
    _write(sink, range(11, 13))
    assert _steps(path) == [*range(1, 13)]
    assert warned == [f"{path}: was removed during the run; its 10 lines are restored"]
    assert [entry.name for entry in path.parent.iterdir()] == ["m.jsonl"]


@pytest.mark.parametrize("is_moved", [False, True])
def test_a_log_whose_folder_is_removed_is_restored(path: Path, sink: JsonlSink, warned: list[str], is_moved: bool):
    path.parent.rename(path.parent.with_name("moved"))
    if not is_moved:
        (path.parent.with_name("moved") / "m.jsonl").unlink()
    assert sink.content().lines == 10  # as a save looks, between two lines
    assert _steps(path) == [*range(1, 11)] and "10 lines are restored" in warned[0]
    _write(sink, range(11, 12))
    assert _steps(path) == [*range(1, 12)] and len(warned) == 1


def test_a_log_that_cannot_be_restored_yet_loses_nothing(path: Path, sink: JsonlSink, monkeypatch: pytest.MonkeyPatch):
    path.unlink()
    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", _refuse)
        _write(sink, range(11, 13))
        assert not path.exists()
    _write(sink, range(13, 14))
    assert _steps(path) == [*range(1, 14)]


def test_a_replaced_log_is_continued_and_the_lines_of_both_are_counted(path: Path, sink: JsonlSink, warned: list[str]):
    """Editors save files like this."""
    path.with_name("new").write_text('{"step": 3}\n{"step": 5}\n{"ste')
    path.with_name("new").replace(path)
    _write(sink, range(11, 13))
    assert _steps(path) == [3, 5, 11, 12]
    assert warned == [f"{path}: was replaced by another file during the run; it has 2 lines, and had 10"]


def test_a_link_in_its_place_is_not_written_through(path: Path, sink: JsonlSink, warned: list[str], tmp_path: Path):
    other = tmp_path / "other"
    other.write_text("mine")
    path.unlink()
    path.symlink_to(other)
    _write(sink, range(11, 13))
    assert other.read_text() == "mine" and len(warned) == 1 and "is no regular file" in warned[0]
    path.unlink()
    _write(sink, range(13, 14))
    assert _steps(path) == [*range(1, 14)]


@pytest.mark.parametrize(("size_bytes", "kept"), [(0, 0), (26, 1), (52, 2), (30, 1)])
def test_lost_lines_of_a_truncated_log_are_counted_and_none_is_damaged(
    path: Path, sink: JsonlSink, warned: list[str], size_bytes: int, kept: int
):
    os.truncate(path, size_bytes)
    _write(sink, range(11, 13))
    assert _steps(path) == [*range(1, kept + 1), 11, 12]
    assert warned == [f"{path}: was truncated during the run; {10 - kept} of 10 lines are lost"]


def test_lines_written_by_others_damage_no_record(path: Path, sink: JsonlSink, warned: list[str]):
    for text in ('{"note": "a"}\n{"note": "b"}\n', "half a line"):
        with path.open("a") as file:
            file.write(text)
        _write(sink, range(11, 12))
    assert [record.get("step") for record in read_jsonl(path)] == [*range(1, 11), None, None, 11, 11]
    assert warned[0] == f"{path}: another process writes to it; 2 lines are not the run's"


@pytest.mark.parametrize("most_bytes", [1, 7, 1000])
def test_a_short_write_is_completed(
    path: Path, sink: JsonlSink, warned: list[str], monkeypatch: pytest.MonkeyPatch, most_bytes: int
):
    write = os.write
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:most_bytes]))
        _write(sink, range(11, 13))
    assert _steps(path) == [*range(1, 13)] and not warned


def test_a_partial_line_that_cannot_be_removed_at_once_damages_no_other(
    path: Path, sink: JsonlSink, warned: list[str], monkeypatch: pytest.MonkeyPatch
):
    write, left = os.write, [9]

    def full(descriptor: int, data: bytes) -> int:
        if left[0] == 0:
            _refuse()
        left[0] = 0
        return write(descriptor, data[:9])

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        patched.setattr(os, "ftruncate", _refuse)
        _write(sink, range(11, 13))
        assert path.read_text().endswith('\n{"step": ')
    _write(sink, range(13, 15))
    assert _steps(path) == [*range(1, 11), 13, 14]
    assert len(warned) == 1 and "No space left on device" in warned[0]


# --- between two runs -------------------------------------------------------------------------------------------------


def _remove(path: Path) -> None:
    path.unlink()


def _damage(path: Path) -> None:
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:3], "\0" * 20 + "\n", *lines[4:6], lines[6][:8], *lines[7:]]))


def _delete_lines(path: Path) -> None:
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:2], *lines[5:]]))


def _nothing(path: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("harm", "lost", "kept"),
    [
        (_nothing, 0, [*range(1, 9)]),
        (_remove, 8, []),
        (_damage, 3, [1, 2, 3, 5, 6]),
        (_delete_lines, 3, [1, 2, 6, 7, 8]),
        (lambda path: os.truncate(path, 60), 6, [1, 2]),
    ],
    ids=["nothing", "removed", "damaged", "lines deleted", "cut"],
)
def test_lines_lost_since_a_checkpoint_are_counted(
    path: Path, warned: list[str], harm: Callable[[Path], object], lost: int, kept: list[int]
):
    tracker = JsonlTracker(path, path.with_name("r.jsonl"), warn=warned.append)
    tracker.resume_at(0)
    for step in range(1, 9):
        tracker.log({"step": step, "loss": 1.5}, {"step": step})
    known = json.loads(json.dumps(tracker.record()))  # in a checkpoint of step 8
    for step in (9, 10):
        tracker.log({"step": step, "loss": 1.5})
    tracker.close(0, patience_s=0)
    harm(path)
    tracker = JsonlTracker(path, path.with_name("r.jsonl"), warn=warned.append)
    tracker.resume_at(8, known)
    assert _steps(path) == kept
    said = (
        f"{path}: {lost} of the 8 lines that it had when step 8 was saved are damaged or lost; the run continues "
        "without"
    )
    assert warned == ([f"{said} them"] if lost else [])
    tracker.log({"step": 9})
    assert _steps(path) == [*kept, 9]
    tracker.close(0, patience_s=0)


def _flip(path: Path) -> None:
    path.write_text(path.read_text().replace('"step": 3, "loss": 1.5', '"step": 3, "loss": 9.5'))


def _empty_a_record(path: Path) -> None:
    path.write_text(path.read_text().replace('"step": 3, "loss": 1.5', '"step": 3'))


def _repeat(path: Path) -> None:
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:3], *lines[2:]]))


def _move(path: Path) -> None:
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[7::-1], *lines[8:]]))


@pytest.mark.parametrize("harm", [_flip, _empty_a_record, _repeat, _move])
def test_changed_lines_are_reported_even_if_their_number_is_right(
    path: Path, warned: list[str], harm: Callable[[Path], object]
):
    tracker = JsonlTracker(path, path.with_name("r.jsonl"), warn=warned.append)
    for step in range(1, 9):
        tracker.log({"step": step, "loss": 1.5}, {"step": step})
    known = tracker.record()
    tracker.log({"step": 9, "loss": 1.5})
    tracker.close(0, patience_s=0)
    harm(path)
    tracker = JsonlTracker(path, path.with_name("r.jsonl"), warn=warned.append)
    tracker.resume_at(8, known)
    assert set(_steps(path)) == {*range(1, 9)}
    size = known["metrics"]["size_bytes"]
    told = f"{path}: its first {size} bytes have changed since step 8 was saved: lines were changed, "
    assert len(warned) == 1 and warned[0].startswith(told)
    tracker.close(0, patience_s=0)


def test_a_log_saved_in_a_checkpoint_is_not_parsed_again(path: Path, sink: JsonlSink, monkeypatch: pytest.MonkeyPatch):
    known = sink.content().record()
    _write(sink, range(11, 14))
    parsed: list[bytes] = []
    monkeypatch.setattr(records, "parse_record", lambda line: (parsed.append(line), parse_record(line))[1])
    again = JsonlSink(path)
    again.resume_at(10, LogContent.from_record(known))
    assert {json.loads(line)["step"] for line in parsed} == {11, 12, 13}
    again.close()
    monkeypatch.undo()
    assert _steps(path) == [*range(1, 11)]


NO_CONTENT: list[object] = [
    None,
    [],
    {},
    {"lines": 1},
    {"lines": 1, "size_bytes": -1, "crc32": 0},
    {"lines": True, "size_bytes": 1, "crc32": 0},
    {"lines": 1, "size_bytes": 1, "crc32": "0"},
    {"lines": 1, "size_bytes": 1 << 60, "crc32": 0},
]


@pytest.mark.parametrize("value", NO_CONTENT)
def test_invalid_log_content_in_a_checkpoint_is_ignored(path: Path, sink: JsonlSink, value: object):
    assert LogContent.from_record(value) is None
    tracker = JsonlTracker(path, path.with_name("r.jsonl"), warn=print)
    tracker.resume_at(10, {"metrics": value})
    tracker.resume_at(10, value)
    assert _steps(path) == [*range(1, 11)]


def test_a_long_log_is_streamed(path: Path, warned: list[str]):
    """On resuming, with or without a checkpoint, and for the last screen."""
    path.parent.mkdir()
    rest = ", ".join(f'"key_{i}": 0.123456789' for i in range(20))
    with path.open("w") as file:
        file.writelines(f'{{"step": {step}, "loss": 2.5, {rest}}}\n' for step in range(1, 20_001))
    for known in (False, True):
        sink = JsonlSink(path, warn=warned.append)
        content = sink.content() if known else None
        tracemalloc.start()
        sink.resume_at(19_990, content)
        steps, losses = loss_curve(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(steps) == len(losses) == 19_990
        assert peak < 4 << 20, "of a log of 13 MB"
        sink.close()


def test_a_loss_curve_skips_other_records(path: Path, sink: JsonlSink):
    big = "9" * 400
    with path.open("a") as file:
        file.write(f'{{"step": {big}, "loss": 1}}\n{{"step": 11, "loss": {big}}}\n{{"step": 12, "loss": null}}\nx\n')
        file.write('{"step": true, "loss": 1.0}\n{"step": 13}\n{"step": 14, "loss": 2}\n{"step": 15, "lo')
    steps, losses = loss_curve(path)
    assert list(steps) == [*range(1, 11), 12, 14]
    assert losses[10] != losses[10] and losses[11] == 2.0


def _refuse(*_: object) -> int:
    raise OSError(28, "No space left on device")
