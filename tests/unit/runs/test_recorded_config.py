"""Tests for the config kept in a run folder, with and without the schema."""

from pathlib import Path

import pytest

from trainer.checkpoint.run_folder import RunFolder
from trainer.config.dump import dump
from trainer.errors import ConfigError
from trainer.runs.recorded_config import plain_config, recorded_config
from trainer.runs.recorded_run import find_run, is_run

ROOT = Path(__file__).parents[3]


def test_plain_values_are_those_of_the_checked_config(tmp_path: Path) -> None:
    from trainer.config.loader import load
    from trainer.experiment import ExperimentConfig

    folder = RunFolder(tmp_path)
    folder.config.write_text(dump(load(ROOT / "configs/smoke.yaml", [], ExperimentConfig)))
    # A dump says nothing of the type of a sequence.
    assert dump(recorded_config(folder)) == folder.config.read_text()
    assert plain_config(folder)["train"]["steps"] == find_run(tmp_path).config.train.steps


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is not a mapping of keys"),
        (b"[1, 2]", "is not a mapping of keys"),
        (b"a: [1", r"config\.yaml:1"),
        (b"\xff\xfe\x00", "is not UTF-8 text"),
        (b"a: 1\na: 2\n", "is not a mapping of keys"),
    ],
)
def test_a_damaged_config_is_said(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=said):
        plain_config(RunFolder(tmp_path))


def test_a_folder_without_config_and_a_name_of_no_file_are_no_runs(tmp_path: Path) -> None:
    assert not is_run(tmp_path) and not is_run(tmp_path / "a\0b") and not is_run(tmp_path / ("x" * 300))
    with pytest.raises(ConfigError, match=r"config\.yaml: cannot be read"):
        plain_config(RunFolder(tmp_path))
