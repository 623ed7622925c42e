"""Tests for the progress of a proof: lines in a log, an updating line on a terminal, nothing on standard output."""

import io

import pytest

from trainer.prove.progress import LayoutProgress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(stream: io.StringIO) -> str:
    """Return the output of the reference and two layouts, 40 seconds each."""
    seconds = iter(range(0, 400, 40))
    progress = LayoutProgress(2, file=stream, clock=lambda: next(seconds))
    with progress.running("1 rank, rows by 8"):
        pass
    for number, name in enumerate(("1 rank, rows by 4", "2 ranks, ep 1, rows by 4"), 1):
        with progress.running(name, number):
            pass
    return stream.getvalue()


def test_a_log_has_a_line_for_each_layout(capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(io.StringIO()).splitlines() == [
        "0 of 2, after 40s: 1 rank, rows by 8, the reference",
        "1 of 2, after 1m 20s: 1 rank, rows by 4",
        "2 of 2, after 2m 00s: 2 ranks, ep 1, rows by 4",
    ]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("kind", ["xterm-256color", "dumb"])
def test_a_terminal_has_one_updating_line_unless_it_is_dumb(
    kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TERM", kind)
    monkeypatch.setenv("COLUMNS", "50")
    text = shown(Terminal())
    assert "1 of 2, after 1m 20s: 1 rank" in text and "2 of 2, after 2m 00s: 2 ranks" in text
    assert ("0:00:00" in text) == (kind != "dumb")  # how long this one runs
    assert ("\x1b[2K" in text) == (kind != "dumb")  # wiped away
    assert capsys.readouterr().out == ""


def test_an_error_of_a_layout_is_raised() -> None:
    with pytest.raises(RuntimeError, match="lost"), LayoutProgress(1, file=io.StringIO()).running("1 rank", 1):
        raise RuntimeError("lost")
