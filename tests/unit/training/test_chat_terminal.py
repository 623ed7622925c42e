"""The command `chat`, driven by a pseudo-terminal and by a pipe."""

import io
import json
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.exported_runs import make_run
from tests.launched_ranks import ROOT
from trainer.cli import parse_command_line
from trainer.data.chat.chat_template import ChatTemplate
from trainer.data.chat.find_template import builtin_text, template_files
from trainer.errors import ConfigError
from trainer.training.chat_session import TooLong

MODEL = {"d_model": 16, "num_layers": 1, "num_heads": 2, "d_ff": 16, "seq_len": 4096, "moe": {"num_experts": 2}}
DEADLINE_S = 120
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "dumb", "OMP_NUM_THREADS": "1"}


def command(run: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "trainer", "chat", str(run), "parallel.device=cpu", *options]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Return the folder of a run with random weights and a template."""
    _, folder, _ = make_run(tmp_path, MODEL)
    for name, text in template_files(ChatTemplate(builtin_text("byte"), name="byte")).items():
        folder.write(folder.path / name, text)
    return folder.path


class Terminal:
    """A pseudo-terminal in which a command runs."""

    def __init__(self, arguments: Sequence[str], directory: Path) -> None:
        self._own, inner = pty.openpty()
        self.process = subprocess.Popen(
            arguments,
            stdin=inner,
            stdout=inner,
            stderr=inner,
            cwd=directory,
            env=ENVIRONMENT,
            start_new_session=True,
            preexec_fn=lambda: _control(inner),
        )
        os.close(inner)
        self.output = ""

    def write(self, text: str) -> None:
        os.write(self._own, text.encode())

    def wait_for(self, *texts: str) -> str:
        """Return what came until one of these texts, with it."""
        until, new = time.monotonic() + DEADLINE_S, ""
        while not any(text in new for text in texts):
            assert time.monotonic() < until, f"none of {texts} in {new!r}"
            if select.select([self._own], [], [], 1)[0]:
                new += os.read(self._own, 1).decode("utf-8", "surrogateescape")
        self.output += new
        return new


def _control(terminal: int) -> None:
    import fcntl
    import termios

    fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)


def test_a_chat_on_a_terminal(run: Path, tmp_path: Path) -> None:
    """Answers stream, Ctrl-C stops one, commands change the history, a file is saved, Ctrl-D ends."""
    terminal = Terminal(command(run, "--max-tokens", "4000", "--seed", "1"), tmp_path)
    assert "/help lists commands" in terminal.wait_for("> ")
    for number in range(9):
        terminal.write(f"Hello {number}\n")
        terminal.wait_for(f"Hello {number}\r\n")
        if "> " not in terminal.wait_for(*"aeiou", "> "):
            break
    terminal.write("\x03")
    assert "stopped: Ctrl-C" in terminal.wait_for("\n> ")
    terminal.write("/undo\n/system Be terse.\n/save out.jsonl\n")
    terminal.wait_for("added to")
    terminal.write("/nothing\n")
    assert "/nothing: is not a command. /reset" in terminal.wait_for("begins a message")
    terminal.wait_for("> ")
    terminal.write("\x04")
    assert terminal.process.wait(DEADLINE_S) == 0
    assert "\x1b" not in terminal.output
    assert "\x07" not in terminal.output
    [row] = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert row["messages"][0] == {"role": "system", "content": "Be terse."}
    assert [message["content"] for message in row["messages"] if message["role"] == "user"] == [
        f"Hello {n}" for n in range(number)
    ]


def piped(arguments: Sequence[str], lines: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the command in this process with lines from a pipe."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    options = parse_command_line(["chat", *arguments, "parallel.device=cpu", "--greedy", "--max-tokens", "5"])
    assert options.command(options) == 0


def test_a_chat_through_a_pipe(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One message a line; only answers are on standard output."""
    monkeypatch.chdir(tmp_path)
    piped([str(run)], "Hello\n\n//quit\n/save a.jsonl\n/quit\nno\n", monkeypatch)
    [row] = map(json.loads, Path("a.jsonl").read_text().splitlines())
    users, answers = ([m["content"] for m in row["messages"] if m["role"] == role] for role in ("user", "assistant"))
    assert users == ["Hello", "/quit"]
    out, notices = capsys.readouterr()
    assert out == "".join(f"{answer}\n" for answer in answers)
    assert "not trained on chats" not in notices
    piped([str(run)], "/save a\0b\n/save .\nHello\n", monkeypatch)  # and the chat goes on
    out, notices = capsys.readouterr()
    assert out == f"{answers[0]}\n" and notices.count("cannot be written: ") == 2


def test_a_run_that_knows_no_chats_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a template of ours if the tokenizer has its markers, else not at all."""
    monkeypatch.chdir(tmp_path)
    for tokenizer in ("byte", "bpe"):
        Path(tokenizer).mkdir()
        make_run(Path(tokenizer), {**MODEL, "seq_len": 32}, tokenizer={"kind": tokenizer})
    piped(["byte/runs/x"], "Hello\n", monkeypatch)
    assert "x: was not trained on chats and may answer anything; using the builtin" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"x: was not trained on chats: it has no chat template, and its tokenizer"):
        piped(["bpe/runs/x"], "Hello\n", monkeypatch)
    with pytest.raises(TooLong, match="the message has 43 tokens with the template, and 27 fit into a row of 32"):
        piped(["byte/runs/x"], "x" * 40, monkeypatch)
