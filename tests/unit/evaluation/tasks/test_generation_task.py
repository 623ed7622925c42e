"""Tests for generation tasks."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.evaluation.task_helpers import SEQ_LEN, build, subject
from trainer.evaluation.eval_report import write_predictions
from trainer.evaluation.tasks.base import Task
from trainer.evaluation.tasks.text_metrics import score_texts
from trainer.models.generation import generate_many, greedy_tokens

ROWS = [{"q": f"Translate {i}: ", "r": f"Satz {i}"} for i in range(5)]


def _build(folder: Path, rows: list[dict[str, Any]], **fields: Any) -> Task:
    fields = {"references": ["{r}"], "max_new_tokens": 12, **fields}
    return build(folder, rows, kind="generation", **fields)


def test_a_batch_generates_the_same_as_single_prompts(tmp_path: Path) -> None:
    result = _build(tmp_path, ROWS).evaluate(subject())
    for row, prediction in zip(ROWS, result.predictions, strict=True):
        prompt = [255, *row["q"].encode()]
        (tokens,) = generate_many(
            subject().engine.model, [prompt], max_new_tokens=12, choose=greedy_tokens, stop_token=255
        )
        text = bytes(token for token in tokens if token < 0xF8).decode("utf-8", "replace").strip()
        assert prediction["prediction"] == text and prediction["ended"] == (tokens[-1] == 255)
        assert prediction["prompt"] == row["q"] and prediction["references"] == [row["r"]]


def test_sampling_is_reproducible_and_differs_between_rows(tmp_path: Path) -> None:
    rows = [ROWS[0]] * 4
    drawn = _build(tmp_path, rows, temperature=1.0)
    texts = [one["prediction"] for one in drawn.evaluate(subject()).predictions]
    assert texts == [one["prediction"] for one in drawn.evaluate(subject()).predictions]
    assert len(set(texts)) == 4


def test_a_prompt_is_truncated_until_the_longest_text_fits(tmp_path: Path) -> None:
    long = {"q": "x" * 100, "r": "y"}
    task = _build(tmp_path, [long, ROWS[0]], max_new_tokens=SEQ_LEN - 1)
    assert task.num_truncated == 2, "room for two tokens"
    assert [one["cut_prompt"] for one in task.evaluate(subject()).predictions] == [True, True]


def test_metrics_equal_hand_computed_ones() -> None:
    texts = ["the cat sat on the mat", "a dog ran away today"]
    references = [["the cat sat on a mat", "the cat is on the mat"], ["the dog ran away today", "dogs run"]]
    bleu = score_texts("bleu", texts, references, bleu_tokenize="13a")
    # 1- to 4-grams that are in a reference: 6 + 4 of 11, 5 + 3 of 9, 3 + 2 of 7, 1 + 1 of 5; no text is too short
    assert bleu.values["bleu"] == pytest.approx(100 * (10 / 11 * 8 / 9 * 5 / 7 * 2 / 5) ** 0.25)
    assert bleu.signature is not None and bleu.signature.startswith("nrefs:2|case:mixed|eff:no|tok:13a|smooth:exp|")
    chrf = score_texts("chrf", texts, references, bleu_tokenize="13a")
    assert 60 < chrf.values["chrf"] < 100 and chrf.signature is not None and "nc:6" in chrf.signature
    rouge = score_texts("rouge", texts, references, bleu_tokenize="13a").values
    assert rouge["rouge1"] == pytest.approx((5 / 6 + 4 / 5) / 2) and rouge["rougeL"] == pytest.approx(
        (5 / 6 + 4 / 5) / 2
    )
    exact = score_texts("exact_match", [" a ", "b"], [["a"], ["c"]], bleu_tokenize="13a")
    assert exact.values == {"exact_match": 0.5}


def test_chinese_has_its_own_tokenizer() -> None:
    texts, references = ["我喜欢吃苹果和香蕉"], [["我喜欢吃苹果和葡萄"]]
    plain, chinese = (score_texts("bleu", texts, references, bleu_tokenize=how).values["bleu"] for how in ("13a", "zh"))
    assert plain < 1 < 50 < chinese


def test_signatures_are_available_before_generation(tmp_path: Path) -> None:
    task = _build(tmp_path, ROWS, metrics=["bleu", "chrf", "rouge", "exact_match"], bleu_tokenize="zh")
    assert set(task.signatures) == {"bleu", "chrf"} and "tok:zh" in task.signatures["bleu"]
    metrics = task.evaluate(subject()).metrics
    assert list(metrics) == ["bleu", "chrf", "rouge1", "rouge2", "rougeL", "exact_match", "ended", "cut_prompts"]


def test_predictions_are_a_file_for_each_task_and_step(tmp_path: Path) -> None:
    result = _build(tmp_path, ROWS).evaluate(subject())
    path = write_predictions(tmp_path / "predictions", result, step=40)
    assert path is not None and path == tmp_path / "predictions/task-step40.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [dict(one) for one in result.predictions]
    assert lines[3]["row"].endswith("rows.jsonl:4")
