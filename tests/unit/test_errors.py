import errno
import os

import pytest

from trainer import cli
from trainer.commands import config
from trainer.errors import ConfigError, RemoteRankError, StopRequested, exit_code_of, first_line


class OutOfMemoryError(RuntimeError):
    """Like that of torch."""


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(errno.ENAMETOOLONG, "File name too long", "x"), 2),
        (OSError(errno.ENOSPC, "No space left on device", "x"), 7),
        (BrokenPipeError(), 0),
        (KeyboardInterrupt(), 130),
        (MemoryError(), 7),
        (OutOfMemoryError("no"), 7),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate"), 7),
        (RuntimeError("Storage size calculation overflowed with sizes=[4611686018427387904]"), 7),
        (OSError(errno.ENOSPC, "No space left on device"), None),
        (RuntimeError("no"), None),
    ],
)
def test_the_process_ends_with_the_code_of_its_error(
    error: BaseException, code: int | None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise error

    assert exit_code_of(error) == code
    monkeypatch.setattr(config, "schema_text", fail)
    monkeypatch.setattr(os, "dup2", lambda *_: None)
    if code is None:
        with pytest.raises(type(error)):
            cli.main(["config", "schema"])
        return
    with pytest.raises(SystemExit) as exit_:
        cli.main(["config", "schema"])
    assert exit_.value.code == code
    assert len(capfd.readouterr().err.splitlines()) == (code != 0)


def test_errors_of_ours_know_their_code() -> None:
    assert [exit_code_of(error) for error in (ConfigError("x"), RemoteRankError("x", 6), StopRequested("x"))] == [
        2,
        6,
        75,
    ]


@pytest.mark.parametrize(("text", "line"), [("", "ValueError"), (" \n", "ValueError"), ("\n  a\nb", "a")])
def test_what_another_s_error_says_is_one_line(text: str, line: str) -> None:
    assert first_line(ValueError(text)) == line
