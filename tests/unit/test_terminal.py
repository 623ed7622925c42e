"""Untrusted text reaches a terminal without control characters, on every path."""

import ast
import io
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.launched_ranks import ROOT
from trainer import cli
from trainer.checkpoint.choice import NEWEST
from trainer.checkpoint.run_folder import RunFolder
from trainer.config.dump import dump, inline
from trainer.config.loader import load
from trainer.data.tokenizers.byte import ByteTokenizer
from trainer.experiment import ExperimentConfig
from trainer.models.sampling import SamplingOptions
from trainer.terminal import print_safe, show_logs, single_line, visible
from trainer.training import generate_text

STEERS = "a\x1b[2J\x07\r\x9b\u202eb\u2028c"
SHOWN = "a\ufffd[2J\ufffd\ufffd\ufffd\ufffdb\ufffdc"
TRAINER = Path(cli.__file__).parent
RAW = {
    "__main__.py": 1,  # one word, before anything is imported
    "terminal.py": 1,  # `print_safe` itself
    "training/generate_text.py": 3,  # generated text, which files and pipes get unchanged
    "training/chat_terminal.py": 3,  # an answer, likewise, and ends of lines
    "commands/config.py": 2,  # YAML and JSON escape control characters themselves
    "commands/checkpoint.py": 2,  # JSON
    "commands/evaluate.py": 1,  # JSON
    "commands/compare_runs.py": 4,  # JSON and empty lines
    "commands/doctor.py": 1,  # JSON
    "commands/list_runs.py": 1,  # JSON
    "commands/report_runs.py": 1,  # JSON
    "commands/run_status.py": 1,  # JSON
    "commands/what_if.py": 1,  # JSON
    "plan/plan_config.py": 1,  # JSON
}
"""Calls of `print` in each file."""


def test_foreign_text_cannot_steer_the_terminal() -> None:
    assert visible(f"{STEERS}\n\tc\udc80\u00e9\u65e5") == f"{SHOWN}\n\tc\ufffd\u00e9\u65e5"
    assert visible("plain") == "plain"


def test_a_line_stays_one_and_short() -> None:
    assert single_line(f"{STEERS}\n\td") == f"{SHOWN} d"
    assert single_line("x" * 10_000) == "x" * 497 + "..."


def test_whoever_prints_goes_through_say() -> None:
    found: dict[str, int] = {}
    for path in TRAINER.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
                name = path.relative_to(TRAINER).as_posix()
                found[name] = found.get(name, 0) + 1
    assert found == RAW


def test_what_is_logged_is_a_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    handler = logging.StreamHandler(sys.stderr)
    monkeypatch.setattr(logging, "lastResort", handler)
    log = logging.Logger("lonely")
    show_logs()
    log.warning("%s: cannot be read\n%s", STEERS, "and more")
    assert capsys.readouterr().err == f"{SHOWN}: cannot be read and more\n"


def test_say_shows_what_it_is_given(capsys: pytest.CaptureFixture[str]) -> None:
    print_safe(STEERS)
    print_safe(ValueError(STEERS), file=sys.stderr)
    captured = capsys.readouterr()
    assert captured.out == captured.err == f"{SHOWN}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "x.yaml", f"--{STEERS}"],
        ["train", "x.yaml", f"--{STEERS}=1", "y\x1b[2J"],
        ["config", "schema", STEERS],
        ["config", "schema", f"--{STEERS}"],
        [STEERS],
        ["eval", "x", "--step", STEERS],
        ["prove", "x.yaml", "--scale", STEERS],
        ["eval", "x", "--" + "x" * 100_000],
    ],
)
def test_an_argument_that_steers_a_terminal_is_shown(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    out, err = capfd.readouterr()
    assert exit_.value.code == 2 and out == ""
    lines = err.splitlines()
    assert 1 <= len(lines) <= 2 and all(line.isprintable() and len(line) <= 700 for line in lines), err[:2000]


def test_a_key_of_anybody_s_section_is_written_so_that_it_reads_back(tmp_path: Path) -> None:
    """DeepSpeed's own sections may have any keys, which `config show` and the run's record print."""
    keys = {"a: b": 1, STEERS: {"x\ny": [{"-": 1, "no": 2}]}, "#": "z", "on": True}
    engine = {"kind": "deepspeed", "deepspeed_config": {"comms_logger": keys}}
    config = ExperimentConfig.model_validate({"name": "x", "engine": engine})
    text = dump(config)
    assert text.replace("\n", "").isprintable() and inline(keys).isprintable()
    (tmp_path / "x.yaml").write_text(text)
    assert load(tmp_path / "x.yaml", [], ExperimentConfig) == config


class Screen(io.StringIO):
    """Standard output."""

    def __init__(self, *, is_terminal: bool) -> None:
        super().__init__()
        self.isatty = lambda: is_terminal  # type: ignore[method-assign]


@pytest.mark.parametrize(("is_terminal", "wanted"), [(True, f"{SHOWN}|{SHOWN}\n"), (False, f"{STEERS}|{STEERS}\n")])
def test_a_prompt_and_what_follows_it_are_shown_on_a_terminal(
    is_terminal: bool, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files and pipes get the text unchanged."""
    engine = SimpleNamespace(model=SimpleNamespace(moe_layers=list))
    monkeypatch.setattr(generate_text, "load_trained", lambda *_, **__: (engine, ByteTokenizer(), None))
    monkeypatch.setattr(generate_text, "generate", lambda *_, **__: iter(f"|{STEERS}".encode()))
    screen = Screen(is_terminal=is_terminal)
    monkeypatch.setattr(sys, "stdout", screen)
    options: dict[str, Any] = {"max_tokens": 1, "sampling": SamplingOptions(temperature=0), "seed": 0, "choice": NEWEST}
    generate_text.generate_text(ExperimentConfig(name="x"), RunFolder(Path("x")), prompt=STEERS, **options)
    assert screen.getvalue() == wanted


@pytest.mark.parametrize("command", [["config", "show", "smoke"], ["runs", "R"]], ids=["print", "print_safe"])
@pytest.mark.parametrize("buffered", [True, False])
def test_a_full_disk_under_the_output_is_said_in_one_line(command: list[str], buffered: bool, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONUNBUFFERED": "" if buffered else "1", "PYTHONPATH": str(ROOT)}
    (tmp_path / "R").mkdir()
    with Path("/dev/full").open("w") as full:
        arguments = [sys.executable, "-m", "trainer", *command]
        where: Any = {"cwd": tmp_path, "env": environment, "stdout": full, "stderr": subprocess.PIPE}
        ended = subprocess.run(arguments, text=True, timeout=60, check=False, **where)
    assert (ended.returncode, ended.stderr) == (7, "standard output: No space left on device\n")


def test_an_output_that_lacks_characters_gets_their_numbers(tmp_path: Path) -> None:
    run = tmp_path / "\u5b9f\u9a13"
    run.mkdir()
    (run / "config.yaml").write_text("train: {steps: 3}")
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    arguments = [sys.executable, "-m", "trainer", "status", str(tmp_path), "--all"]
    ended = subprocess.run(arguments, capture_output=True, text=True, env=environment, timeout=60, check=False)
    assert ended.returncode == 0 and "\\u5b9f\\u9a13: not started" in ended.stdout, ended.stderr
