"""Commands refuse wrong arguments with one line that names them, before anything starts."""

from pathlib import Path

import pytest

from trainer import cli


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert end.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--temperature", "-1"], "generate: --temperature: -1 is not a finite number of at least 0\n"),
        (["--top-p", "2"], "generate: --top-p: 2 is not more than 0 and at most 1\n"),
        (
            ["--greedy", "--temperature", "0.5"],
            "generate: --greedy is --temperature 0, not 0.5; leave one of them out\n",
        ),
    ],
)
def test_generate_names_the_wrong_option(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, "generate", "runs/x", *options) == message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "smoke", "--gpu", "H100", "--world-size", "8", "--write"], "--write"),
        (["doctor", "--cluster", "--links"], "--links"),
        (["prove", "smoke", "--json"], "--json"),
        (["what-if", "t", "--ep-size", "2", "--write-placement"], "--write-placement"),
    ],
)
def test_a_file_that_cannot_be_written_is_refused_before_anything_is_measured(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "no" / "x.json"
    said = refused(capsys, *arguments, str(file))
    assert said == f"{message}: {file}: there is no folder {file.parent}; name a file in a folder that exists\n"


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--world-size", "1000000000000"], "--world-size: must be at most 1048576 ranks, got '1000000000000'"),
        (["--world-size", "8", "--memory", "0"], "--memory: must be a number above 0 and below 1e9, got '0'"),
    ],
)
def test_plan_says_which_numbers_it_takes(option: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refused(capsys, "plan", "smoke", "--gpu", "H100", *option)


def test_a_command_that_a_message_names_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    """Of a placement with copies where none are wanted."""
    options = ["--ep-size", "2", "--replicas", "0", "--write-placement", "no/x.json"]
    assert "--write-placement: no/x.json: there is no folder no" in refused(capsys, "what-if", "t", *options)
    said = refused(capsys, "doctor", "smoke", "--static", "--ranks-per-node", "8")
    assert said == "--ranks-per-node: 8 of 1 ranks; give --world-size too\n"


def test_folders_without_a_run_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs/failed").mkdir(parents=True)
    assert refused(capsys, "train", "runs/failed") == (
        "runs/failed: has no config.yaml: no run has started here; name a config file\n"
    )
    assert refused(capsys, "eval", "runs/nosuch") == "runs/nosuch: no such file, and no such run folder\n"


def test_prove_needs_deepspeed_before_it_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("trainer.packages.find_spec", lambda name: None)
    error = refused(capsys, "prove", "smoke", "--engines", "native,deepspeed")
    assert error.startswith("engine.kind: needs deepspeed, which is not installed; pip install deepspeed")


def test_check_plugin_stops_and_fails_if_it_cannot_be_built(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(["check-plugin", "tests.unit.config.test_build_plugin:NoneConfig"])
    lines = capsys.readouterr().out.splitlines()
    assert end.value.code == 1
    assert (len(lines), lines[1][:6], lines[-1]) == (4, "FAILED", "1 check failed")
