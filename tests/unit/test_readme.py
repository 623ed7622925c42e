"""The YAML that documents show is a config, and what it reads is there or made by a command beside it."""

import re
import shutil
from pathlib import Path

import pytest

from scripts.recipes import __main__ as recipes
from tests.launched_ranks import ROOT
from tests.unit.test_recipes import local_files
from trainer.checkpoint.tools.weight_map import WeightMapConfig
from trainer.config.loader import load
from trainer.data.tokenizers.byte import ByteTokenizer
from trainer.experiment import ExperimentConfig

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = {
    f"{path.stem} {number}": (path, str(block))
    for path in DOCUMENTS
    for number, block in enumerate(re.findall(r"^```yaml\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE))
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which somebody follows the documents: with our configs, and a config of their own beside them."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "configs/mine.yaml"


@pytest.mark.parametrize(("path", "block"), BLOCKS.values(), ids=BLOCKS.keys())
def test_yaml_in_a_document_is_a_config_whose_files_are_there(path, block, place, monkeypatch):
    if block.startswith("weights:"):
        place.write_text(block)
        load(place, [], WeightMapConfig)
        return
    place.write_text(block if "\nname:" in block else f"name: mine\n{block}")
    config = load(place, [], ExperimentConfig)
    if path.name != "README.md":  # a reader's own files
        return
    for name in re.findall(r"^python -m scripts\.recipes (\w+)", path.read_text(), re.MULTILINE):
        monkeypatch.setattr("sys.argv", ["recipes", name])
        recipes.main()
    assert [file for file in local_files(config) if not Path(file).is_file()] == []
    for task in config.eval.tasks:
        assert task.build(ByteTokenizer(), seq_len=config.model.seq_len).num_examples


def test_the_readme_shows_a_whole_config_and_tasks():
    shown = [block for path, block in BLOCKS.values() if path.name == "README.md"]
    assert len(shown) == 2
    whole = next(block for block in shown if "\nname:" in block)
    sections = set(ExperimentConfig.model_fields) - {"runs_dir"}
    assert sections <= set(re.findall(r"^(\w+):", whole, re.MULTILINE))
