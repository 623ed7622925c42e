import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trainer.config.loader import load
from trainer.experiment import ExperimentConfig
from trainer.models.flops import model_size
from trainer.models.gpt import GPT

ROOT = Path(__file__).parents[2]
LANGUAGES = ("en", "de", "fr", "cs")


def recipe(name: str) -> ExperimentConfig:
    return load(str(ROOT / "configs/recipes" / f"{name}.yaml"), [], ExperimentConfig)


@pytest.mark.parametrize("path", sorted((ROOT / "configs/recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_sound(path):
    load(str(path), [], ExperimentConfig)


def test_the_twin_has_as_many_active_parameters():
    with torch.device("meta"):
        sizes = [model_size(GPT(recipe(name).model, 4096)) for name in ("translation", "translation_dense")]
    moe, dense = (size.active_parameters for size in sizes)
    assert dense == pytest.approx(moe, rel=0.01)
    assert sizes[0].total_parameters > 1.5 * sizes[1].total_parameters


def prepare(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts/prepare_multi30k.py"), str(folder), str(folder / "out")]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)


@pytest.fixture
def multi30k(tmp_path: Path) -> Path:
    for split in ("train", "val", "test_2016_flickr"):
        for language in LANGUAGES:
            # A line separator inside a sentence is no end of a line.
            text = f"{split} {language} one\n{split} {language}\u2028two \n"
            (tmp_path / f"{split}.{language}.gz").write_bytes(gzip.compress(text.encode()))
    return tmp_path


def test_multi30k_becomes_rows_of_four_languages(multi30k):
    done = prepare(multi30k)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (multi30k / "out/val.jsonl").read_text().split("\n")[:-1]]
    assert rows == [
        {language: f"val {language} one" for language in LANGUAGES},
        {language: f"val {language}\u2028two" for language in LANGUAGES},
    ]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("only one\n", "train.de: has 1 lines, and "),
        ("one\n\n", "train.de:2: is empty; a line is one sentence in every language; get it again"),
        (None, "train.de: no such file; "),
    ],
)
def test_files_that_are_not_parallel_are_named(multi30k, text, reason):
    (multi30k / "train.de.gz").unlink()
    if text is not None:
        (multi30k / "train.de").write_text(text)
    done = prepare(multi30k)
    assert done.returncode == 3
    assert reason in done.stderr
    assert "\n" not in done.stderr.strip()
    assert not (multi30k / "out").exists()
