"""Run the recipes unchanged, with the hub's names, columns and files; a local hub holds a few rows of each."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests import imported_once
from tests.fake_hub import Hub, serving
from tests.launched_ranks import ROOT

TINY = [
    "model.num_layers=1", "model.d_model=16", "model.num_heads=2", "model.moe.num_experts=4", "model.moe.d_ff=16",
    "data.tokenizer.vocab_size=300", "data.split.fraction=0.2", "train.steps=2", "train.global_batch_size=4",
    "parallel.micro_batch_size=4", "schedule.warmup_steps=1", "checkpoint.every=null",
]  # fmt: skip
BOX = "benchmark/5core/last_out_w_his/Video_Games"


def parquet(rows: list[dict[str, Any]]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file.getvalue()


def table(rows: list[dict[str, Any]]) -> bytes:
    file = io.StringIO()
    writer = csv.DictWriter(file, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode()


def reviews(number: int) -> list[dict[str, Any]]:
    return [{"text": f"a film about {i} dogs", "label": i % 2} for i in range(number)]


def dialogues(number: int) -> list[dict[str, Any]]:
    said = [
        {"id": f"{i}", "dialogue": f"Ann: {i} dogs?\nBob: Yes.", "summary": f"Bob has {i} dogs."} for i in range(number)
    ]
    return [*said, {"id": "none", "dialogue": "", "summary": "Nothing was said."}]


def purchases(number: int) -> list[dict[str, Any]]:
    items = [f"B{i:09d}" for i in range(number)]

    def row(i: int) -> dict[str, Any]:
        history = " ".join(items[i % 7 : i % 4 * 3])
        return {"user_id": f"u{i}", "parent_asin": items[i], "rating": 5.0, "timestamp": i, "history": history}

    return [row(i) for i in range(number)]


def judged(number: int) -> list[dict[str, Any]]:
    def row(i: int) -> dict[str, Any]:
        return {
            "example_id": i,
            "query": f"{i // 4} dogs",
            "product_title": f"dog {i}" if i < number else None,
            "product_locale": "us" if i % 8 < 4 else "es",
            "esci_label": ("Exact", "Irrelevant", "Exact", "Substitute")[i % 4],
        }

    return [row(i) for i in range(number + 1)]


HUBS = {
    "sentiment": [
        Hub("cornell-movie-review-data/rotten_tomatoes", commit="a" * 40, files={
            "README.md": b"---\n---\n", "train.parquet": parquet(reviews(60)), "test.parquet": parquet(reviews(12))}),
        Hub("stanfordnlp/imdb", commit="b" * 40, files={
            "README.md": b"---\nconfigs:\n- config_name: plain_text\n  data_files:\n  - split: unsupervised\n"
                         b"    path: plain_text/unsupervised-*\n---\n",
            "plain_text/unsupervised-00000-of-00001.parquet": parquet(reviews(60))}),
    ],
    "summarization": [
        Hub("knkarthick/samsum", commit="c" * 40, files={
            "README.md": b"---\n---\n", "train.csv": table(dialogues(60)), "test.csv": table(dialogues(6))}),
    ],
    "recommendation": [
        Hub("McAuley-Lab/Amazon-Reviews-2023", commit="d" * 40, files={
            f"{BOX}.train.csv": table(purchases(240)), f"{BOX}.test.csv": table(purchases(240))}),
    ],
    "search": [
        Hub("tasksource/esci", commit="e" * 40, files={
            "README.md": b"---\n---\n", "data/train-00000-of-00001.parquet": parquet(judged(240)),
            "data/test-00000-of-00001.parquet": parquet(judged(24))}),
    ],
    "translation": [
        Hub("bentrevett/multi30k", commit="f" * 40, files={
            "README.md": b"---\n---\n",
            "train.jsonl": b"".join(
                json.dumps({"en": f"{i} dogs", "de": f"{i} Hunde"}).encode() + b"\n" for i in range(60))}),
    ],
}  # fmt: skip
MORE = {
    "translation": [
        'data.sources=[{kind: hf, path: bentrevett/multi30k, prompt: "English: {en}\\nGerman: ", text: "{de}"}]',
        "eval.tasks=[]",
    ],
    "recommendation": ["eval.tasks.0.max_examples=2"],
}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", HUBS)
def test_a_recipe_reads_what_the_hub_has_under_its_names(name, tmp_path):
    with serving(*HUBS[name]) as hub:
        environment = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}

        def run(*arguments: str) -> str:
            done = imported_once.run(arguments, cwd=tmp_path, environment=environment, timeout=200)
            assert done.returncode == 0, done.stderr
            return done.stdout

        if name in ("recommendation", "search"):
            run(str(ROOT / "scripts/prepare_rankings.py"), name)
        run("-m", "trainer", "train", str(ROOT / f"configs/recipes/{name}.yaml"), *TINY, *MORE.get(name, []))
    lines = (tmp_path / f"runs/{name}/metrics.jsonl").read_text().splitlines()
    assert [record for record in map(json.loads, lines) if "eval/loss" in record][-1]["step"] == 2


def test_questions_have_the_right_answers_among_their_candidates(tmp_path):
    (tmp_path / "a.csv").write_bytes(table(purchases(240)))
    (tmp_path / "a.parquet").write_bytes(parquet(judged(24)))
    for name, options in {
        "recommendation": ["a.csv"],
        "search": ["a.parquet", "--path", "parquet", "--split", "test"],
    }.items():
        script = [str(ROOT / "scripts/prepare_rankings.py"), name, str(tmp_path / name), "--data-files"]
        done = imported_once.run([*script, *options], cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    people, queries = (questions(tmp_path / name / "test.jsonl") for name in ("recommendation", "search"))
    for question in people:
        assert len(set(question["candidates"])) == 100
        assert question["next"] in question["candidates"]
        assert not set(question["history"].split()) - {question["next"]} & set(question["candidates"])
    assert 0 < len(people) < 240  # who bought nothing before is left out
    assert queries[0] == {
        "user": "us",
        "query": "0 dogs",
        "candidates": ["dog 0", "dog 1", "dog 2", "dog 3"],
        "relevant": ["dog 0", "dog 2"],
    }
    assert len(queries) == 6


def questions(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
