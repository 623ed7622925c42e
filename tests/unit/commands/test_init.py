"""Tests for `turnout init`: it writes a valid config with comments, and overwrites nothing."""

from pathlib import Path

import pytest
import yaml

from trainer import cli
from trainer.commands.shipped import SCHEMA
from trainer.config.loader import load
from trainer.experiment import ExperimentConfig


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        cli.main(["init", *arguments])
    assert isinstance(end.value.code, int)
    return end.value.code


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("argument", "file", "name"),
    [((), "first.yaml", "first"), (("mine",), "mine.yaml", "mine"), (("a.b.yml",), "a.b.yml", "a.b")],
)
def test_the_file_is_a_valid_config_with_its_schema(
    argument: tuple[str, ...], file: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*argument) == 0
    assert capsys.readouterr().out == f"wrote {file}; train it with: turnout train {file}\n"
    lines = Path(file).read_text().splitlines()
    assert lines[0] == f"# yaml-language-server: $schema={SCHEMA}" and SCHEMA.is_file()
    assert max(len(line) for line in lines[1:]) <= 120
    config = load(file, [], ExperimentConfig)
    assert config.name == name
    assert config.model.moe is not None


def test_the_alternatives_in_its_comments_are_valid_too() -> None:
    run("mine")
    text = Path("mine.yaml").read_text()
    (own_text,) = [line.strip().removeprefix("# - ") for line in text.splitlines() if line.strip().startswith("# - ")]
    source = yaml.safe_load(own_text)
    sources = f"data.sources=[{{kind: {source['kind']}, path: '{source['path']}', domain: {source['domain']}}}]"
    overrides = [sources, "data.tokenizer={kind: bpe, vocab_size: 8192}", "model.moe=null"]
    config = load("mine.yaml", overrides, ExperimentConfig)
    assert "{kind: bpe, vocab_size: 8192}" in text
    assert config.data.sources[0].kind == "text"


def test_a_file_that_is_there_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.yaml").write_text("name: precious\n")
    assert run("mine") == 2
    assert capsys.readouterr().err == "mine.yaml: exists already; choose another name, or remove the file\n"
    assert Path("mine.yaml").read_text() == "name: precious\n"


def test_a_name_that_no_run_can_have_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("two words") == 2
    assert capsys.readouterr().err == ("init: 'two words' is not a name; use letters, digits, '.', '_' and '-'\n")
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smoke", "init: smoke is a config of the package; choose another name\n"),
        ("a/b", "init: there is no folder a; make it first, or give a name alone\n"),
    ],
)
def test_a_name_that_would_collide_or_has_no_folder_is_refused(
    name: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(name) == 2
    assert capsys.readouterr().err == message
