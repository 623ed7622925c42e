"""Tests for the command line: help, examples and unknown arguments."""

import argparse
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from trainer.cli import command_line, main, parse_command_line


def commands(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """Yield the parser of every command and subcommand."""
    below = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not below:
        yield parser
    for action in below:
        for sub in action.choices.values():
            yield from commands(sub)


COMMANDS = {command.prog: command for command in commands(command_line())}


def test_there_are_all_commands() -> None:
    assert {"turnout train", "turnout eval", "turnout generate", "turnout checkpoint prune"} <= COMMANDS.keys()
    assert len(COMMANDS) == 45


def test_ctrl_c_before_there_is_a_command_is_one_line() -> None:
    code = """if True:
        import runpy, sys
        class Interrupted:
            def find_spec(self, name, path=None, target=None):
                if name == "trainer.commands":
                    raise KeyboardInterrupt
        sys.meta_path.insert(0, Interrupted())
        runpy.run_module("trainer", run_name="__main__")
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_has_an_example_that_is_understood(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([*name.split()[1:], "--help"])
    assert exit_.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    _, found, example = said.partition(" example: ")
    assert found and example.startswith(name)
    options = parse_command_line(shlex.split(example)[1:])
    assert options.command is COMMANDS[name].get_default("command")
    assert said.startswith(f"usage: {name} [-h]")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_argument_of_a_command_is_described(name: str) -> None:
    assert [action.dest for action in COMMANDS[name]._actions if not action.help] == []


@pytest.mark.parametrize("command", ["eval", "generate", "checkpoint list", "checkpoint verify", "checkpoint prune"])
def test_commands_that_take_a_run_document_it(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*command.split(), "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert " RUN [a.b=c ...]" in said and "RUN run folder, such as runs/smoke; or the experiment file" in said
    assert f"example: turnout {command} runs/smoke" in said


def test_the_version_is_one_line_and_needs_no_torch(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith("turnout ") and f", Python {platform.python_version()}, torch 2." in out
    assert len(out.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "lines"),
    [
        ("train x.yaml --train.steps 10", ["--train.steps: is not an option; write train.steps=10"]),
        *(
            (
                f"{given} train x.yaml",
                [
                    "--train.steps: is not an option; write train.steps=10; the command comes first, then the config, "
                    "then its overrides and options: turnout train CONFIG a.b=c"
                ],
            )
            for given in ("--train.steps 10", "--train.steps=10")
        ),
        (
            "train.steps=10 train x.yaml",
            [
                "train.steps=10: is not a command; the command comes first, then the config, then its overrides and "
                "options: turnout train CONFIG a.b=c"
            ],
        ),
        (
            "--nproc 2 launch x.yaml",
            [
                "--nproc: is not a command; the command comes first, then the config, then its overrides and options: "
                "turnout train CONFIG a.b=c"
            ],
        ),
        ("train x.yaml --train.steps = 10", ["--train.steps: is not an option; write train.steps=10"]),
        (
            "train x.yaml --nothing 1 train.steps 10",
            ["--nothing: is not an option; leave it out", "train.steps: is not an override; write train.steps=10"],
        ),
        ("train x.yaml --train.steps=10", ["--train.steps: is not an option; write train.steps=10"]),
        ("launch x.yaml --nproc 2 --lr 1e-3 name=y", ["--lr: is not an option; write schedule.peak_lr=1e-3"]),
        (
            "train x.yaml --bf16 --seed 3 7",
            [
                "--bf16: is not an option; write train.dtype=... (as bfloat16)",
                "--seed: is not an option; write seed=3",
                "7: is not an override; write key=value, such as train.steps=100",
            ],
        ),
        ("config schema --x", ["turnout: unrecognized arguments: --x; see turnout --help"]),
        ("eval", ["turnout eval: the following arguments are required: RUN; see turnout eval --help"]),
        (
            "prove x.yaml --steps a",
            [
                "turnout prove: argument --steps: must be a whole number of at least 1, got 'a'; see turnout prove "
                "--help"
            ],
        ),
        (
            "prove x.yaml --engines native,x",
            [
                "turnout prove: argument --engines: 'x' is not an engine; use native or deepspeed, or both separated "
                "by a comma; see turnout prove --help"
            ],
        ),
        (
            "generate runs/x --seed -1",
            [
                "turnout generate: argument --seed: must be a whole number of at least 0, got '-1'; see turnout "
                "generate --help"
            ],
        ),
    ],
)
def test_unknown_arguments_get_one_line_each(
    arguments: str, lines: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments.split())
    assert exit_.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.splitlines() == lines


def test_overrides_may_precede_and_follow_options() -> None:
    first = parse_command_line(["train", "x.yaml", "a=1"])
    second = parse_command_line(["eval", "runs/x", "a=1", "--step", "3", "b=2"])
    assert (first.overrides, second.overrides, second.step) == (["a=1"], ["a=1", "b=2"], 3)
    assert parse_command_line(["train", "x.yaml"]).overrides == []


@pytest.fixture
def run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder with the folder of a run."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "runs" / "a" / "checkpoints" / "step_00000007").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "config.yaml").write_text("name: a\n")
    return tmp_path / "runs" / "a"


def said_by(arguments: list[str], capsys: pytest.CaptureFixture[str], *, code: int) -> str:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == code
    return capsys.readouterr().err


@pytest.mark.parametrize("command", ["eval", "generate", "checkpoint verify", "checkpoint export-dcp"])
def test_naming_a_checkpoint_suggests_its_run_and_step(
    command: str, run_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run_folder.parent)
    rest = ["out"] if command.endswith("dcp") else []
    end = ": is a checkpoint of a run; name the run and its step: {} --step 7\n"
    for name, run in (
        ("~/runs/a/checkpoints/step_00000007", str(run_folder)),
        ("a/checkpoints/step_00000007", "a"),
    ):
        said = said_by([*command.split(), name, *rest], capsys, code=4)
        assert said == name.replace("~", str(run_folder.parents[1])) + end.format(run)
    monkeypatch.chdir(run_folder / "checkpoints")
    assert said_by([*command.split(), "step_00000007", *rest], capsys, code=4) == "step_00000007" + end.format(
        run_folder
    )


@pytest.mark.parametrize("command", ["train", "launch", "checkpoint list", "checkpoint prune"])
def test_naming_a_folder_inside_a_run_suggests_the_run(
    command: str, run_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    step, all_of_them = run_folder / "checkpoints" / "step_00000007", run_folder / "checkpoints"
    said = said_by([*command.split(), str(step)], capsys, code=4)
    assert said == f"{step}: is a checkpoint of a run; name the folder of the run: {run_folder}\n"
    said = said_by([*command.split(), str(all_of_them)], capsys, code=4)
    assert said == f"{all_of_them}: is the checkpoints folder of a run; name the folder of the run: {run_folder}\n"


def test_a_tilde_left_by_the_shell_is_the_home_folder(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["config", "diff", "~/runs/a/config.yaml", "~/runs/a/config.yaml"])
    assert exit_.value.code == 0
    options = parse_command_line(["bench", "routers", "--json=~/x.json"])
    assert options.json == run_folder.parents[1] / "x.json"
    assert "a/nothing" in said_by(["eval", "~/runs/a/nothing"], capsys, code=2)
