import gzip
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from scripts.recipes.__main__ import RECIPES
from tests import imported_once
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


CONFIGS = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name != "sweeps")


def local_files(config: ExperimentConfig) -> list[str]:
    """Return the paths that a config reads from this machine."""
    rows = [*config.data.sources, *(task.rows for task in config.eval.tasks)]
    given = [getattr(one, "path", None) for one in rows if one.kind in ("text", "jsonl", "chat")]
    given += [getattr(task, "candidates_file", None) for task in config.eval.tasks]
    return [path for one in given if one is not None for path in ([one] if isinstance(one, str) else one)]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_config_that_reads_files_says_what_makes_them(path):
    config = load(str(path), [], ExperimentConfig)
    if path.stem.startswith("moe_") or path.parent.name == "planning":  # anybody's own text
        return
    assert (config.prepare is not None) == bool(local_files(config))
    if config.prepare is None:
        return
    if script := re.search(r"python (scripts/\w+\.py)", config.prepare):
        assert (ROOT / script[1]).is_file()
    elif small := re.fullmatch(r"python -m scripts\.recipes (\w+)", config.prepare):
        made = {f"data/small/{small[1]}/{name}" for name in RECIPES[small[1]](random.Random(0))}
        assert set(local_files(config)) <= made
    else:
        assert config.prepare.startswith(f"curl -o {local_files(config)[0]} https://")


def test_the_stages_follow_each_other_in_the_order_of_their_script():
    script = (ROOT / "scripts/stages.sh").read_text()
    stages = re.findall(r"for stage in ([\w ]+);", script)[0].split()
    configs = [load(str(ROOT / f"configs/stages/{stage}.yaml"), [], ExperimentConfig) for stage in stages]
    begins_from = [None if config.init_from is None else config.init_from.run for config in configs]
    assert begins_from == [None, *(f"{config.runs_dir}/{config.name}" for config in configs[:-1])]
    assert configs[-1].prepare is not None and configs[-1].prepare.removeprefix("python ") in script


def test_a_file_that_is_missing_is_named_with_the_command_that_makes_it(tmp_path):
    config = str(ROOT / "configs/recipes/small/recommendation.yaml")
    result = imported_once.run(["-m", "trainer", "train", config], cwd=tmp_path)
    assert result.returncode == 3
    assert result.stderr == (
        f"data/small/recommendation/train.jsonl: no such file; paths are relative to {tmp_path}; correct the path, or "
        "make what this config reads: python -m scripts.recipes recommendation\n"
    )
    Path(tmp_path, "data/small/recommendation").mkdir(parents=True)
    rows = "".join(json.dumps({"history": f"a; b {i}", "next": f"c {i}"}) + "\n" for i in range(300))
    for name in ("train.jsonl", "test.jsonl"):
        Path(tmp_path, "data/small/recommendation", name).write_text(rows)
    result = imported_once.run(["-m", "trainer", "train", config], cwd=tmp_path)
    assert result.returncode == 3
    assert result.stderr.startswith("data/small/recommendation/items.txt: no such file; ")
    assert result.stderr.endswith(" or make what this config reads: python -m scripts.recipes recommendation\n")


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
