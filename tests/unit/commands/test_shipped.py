"""Tests for shipped configs: found by name, unless the folder has a file of that name."""

import tomllib
from pathlib import Path

import pytest

from trainer import load_config
from trainer.cli import parse_command_line
from trainer.commands.config import diff_command, show_command
from trainer.commands.resolve import load_named_config
from trainer.commands.shipped import FOLDER, as_config, shipped_names
from trainer.config.dump import dump
from trainer.errors import ConfigError

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_they_are_those_at_the_top_of_configs_and_packed_from_there() -> None:
    assert FOLDER.is_symlink() and FOLDER.samefile(ROOT / "configs")
    assert shipped_names() == sorted(path.stem for path in (ROOT / "configs").glob("*.yaml")) != []
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packed = project["tool"]["setuptools"]["package-data"]["trainer"]
    assert {"configs/*.yaml", "configs/schema.json"} < set(packed)


@pytest.mark.parametrize("name", shipped_names())
def test_each_is_read_by_its_name(name: str) -> None:
    assert load_named_config(parse_command_line(["train", name])).name == name


def test_a_file_or_folder_of_that_name_comes_first(folder: Path) -> None:
    assert as_config("smoke") == FOLDER / "smoke.yaml"
    (folder / "smoke").mkdir()
    assert as_config("smoke") == Path("smoke")


@pytest.mark.parametrize("text", ["configs/smoke", "smoke.yaml", "recipes/search", "", ".", "other"])
def test_other_names_stay_paths(text: str) -> None:
    assert as_config(text) == Path(text)


def test_an_unknown_name_is_answered_with_those_that_there_are() -> None:
    with pytest.raises(ConfigError) as error:
        load_named_config(parse_command_line(["train", "quikstart"]))
    assert str(error.value) == (
        "quikstart: no such file, and no config of the package; those are "
        f"{', '.join(shipped_names())}; `turnout init NAME` writes a first one of your own"
    )


def test_an_unknown_name_with_a_similar_file_is_answered_with_the_file(folder: Path) -> None:
    (folder / "mine.yaml").write_text("name: mine\n")
    with pytest.raises(ConfigError, match=r"did you mean mine\.yaml\?$"):
        load_named_config(parse_command_line(["train", "mine"]))


def test_config_show_takes_a_run_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "run").mkdir()
    (folder / "run/config.yaml").write_text(dump(load_config("smoke", ["train.steps=7"])))
    assert show_command(parse_command_line(["config", "show", "run", "train.global_batch_size=4"])) == 0
    shown = capsys.readouterr().out
    assert "steps: 7\n" in shown and "global_batch_size: 4\n" in shown


def test_config_diff_takes_names_and_run_folders(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "run").mkdir()
    (folder / "run/config.yaml").write_text(dump(load_config("smoke", ["train.steps=7"])))
    for first, steps in (("quickstart", load_config("quickstart").train.steps), ("run", 7)):
        assert diff_command(parse_command_line(["config", "diff", first, "smoke"])) == 0
        assert f"train.steps: {steps} -> {load_config('smoke').train.steps}" in capsys.readouterr().out
