"""Train every recipe in its small form, offline, for less long than it says, and check that it learns its task."""

import json
from pathlib import Path

import pytest

from scripts.recipes.__main__ import RECIPES
from tests import imported_once
from tests.launched_ranks import ROOT
from trainer.evaluation.tasks.text_metrics import score_texts

STEPS = {"recommendation": 150, "search": 150, "sentiment": 200, "summarization": 170, "translation": 200}
"""Enough for each: 60 to 80 percent of those in its file."""


def run(folder: Path, *arguments: str) -> None:
    done = imported_once.run(["-m", *arguments], cwd=folder, environment={"HF_HUB_OFFLINE": "1"}, timeout=400)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def results(tmp_path: Path, request: pytest.FixtureRequest) -> dict[str, float]:
    """Train the small form of a recipe; return its last evaluation."""
    name = request.param
    run(tmp_path, "scripts.recipes", name)
    config = str(ROOT / f"configs/recipes/small/{name}.yaml")
    run(tmp_path, "trainer", "train", config, f"train.steps={STEPS[name]}")
    lines = (tmp_path / f"runs/small-{name}/metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "eval/loss" in record][-1]


@pytest.mark.nightly
@pytest.mark.parametrize("results", ["translation"], indirect=True)
def test_sentences_are_translated(results):
    assert min(results[f"eval/test-{language}/bleu"] for language in ("de", "fr", "cs")) > 50
    assert min(results[f"eval/test-{language}/ended"] for language in ("de", "fr", "cs")) > 0.9
    assert results["eval/expert_domain_mi"] > 0.01


@pytest.mark.nightly
@pytest.mark.parametrize("results", ["sentiment"], indirect=True)
def test_reviews_are_understood(results):
    assert results["eval/sentiment/acc"] > 0.9  # chance has 0.5


@pytest.mark.nightly
@pytest.mark.parametrize("results", ["summarization"], indirect=True)
def test_summaries_say_what_was_agreed_on(results, tmp_path):
    rows = [json.loads(line) for line in (tmp_path / "data/small/summarization/test.jsonl").read_text().splitlines()]
    first_lines = [row["dialogue"].split("\n")[0] for row in rows]
    lead = score_texts("rouge", first_lines, [[row["summary"]] for row in rows], bleu_tokenize="13a").values["rougeL"]
    assert results["eval/summary/rougeL"] > lead + 0.2
    assert results["eval/summary/exact_match"] > 0.3


@pytest.mark.nightly
@pytest.mark.parametrize("results", ["recommendation"], indirect=True)
def test_the_next_item_is_among_ten_of_sixty(results):
    assert results["eval/next/hit@10"] > 0.9  # chance has 0.17
    assert results["eval/next/hit@1"] > 0.25


@pytest.mark.parametrize("results", ["search"], indirect=True)
def test_the_same_query_finds_what_a_person_means(results):
    assert results["eval/search/mrr"] > 0.8  # who only knows the query has 0.52, chance 0.29


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", RECIPES)
def test_the_data_are_always_the_same_and_no_question_was_learned(name, tmp_path):
    run(tmp_path, "scripts.recipes", name, "a")
    run(tmp_path, "scripts.recipes", name, "b")
    files = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()}
    learned, asked = ([json.loads(line) for line in files[f"{part}.jsonl"].splitlines()] for part in ("train", "test"))
    assert all(row not in learned for row in asked)
