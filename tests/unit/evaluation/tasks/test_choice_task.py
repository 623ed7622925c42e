"""Tests for multiple-choice tasks."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.unit.evaluation.task_helpers import SEQ_LEN, build, subject
from trainer.data.batches.batch import Batch
from trainer.evaluation.tasks.choice_task import choice_metrics, macro_f1
from trainer.moe.routing import RoutingOptions

ROWS: list[dict[str, Any]] = [
    {"q": "I like it.", "label": 0, "said": "good"},
    {"q": "", "label": 1, "said": " bad\n"},
    {"q": "No!", "label": 2, "said": "neither of the two"},
]
CHOICES = ["good", "bad", "neither of the two"]


def _tokens(text: str) -> list[int]:
    return list(text.encode())


@torch.no_grad()
def _log_prob(prompt: str, completion: list[int]) -> float:
    """Score a completion with one full pass over end of document, prompt and completion."""
    context = [255, *_tokens(prompt)]
    text = torch.tensor([[*context, *completion]])
    column = torch.arange(text.shape[1] - 1)[None]
    zero = torch.zeros_like(column)
    batch = Batch(
        tokens=text[:, :-1],
        targets=text[:, 1:],
        loss_mask=column >= len(context) - 1,
        valid=torch.ones_like(column, dtype=torch.bool),
        document_id=zero,
        position=column,
        domain=zero,
        sample_id=zero,
    )
    return -float(subject().engine.model(batch, RoutingOptions(dropless=True)).row_loss)


@pytest.mark.parametrize("ends_document", [True, False])
@pytest.mark.parametrize("answer", ["label", "said"], ids=["by number", "by text"])
def test_metrics_equal_those_of_full_passes(tmp_path: Path, ends_document: bool, answer: str) -> None:
    fields: dict[str, Any] = {"choices": CHOICES, "answer": answer, "ends_document": ends_document}
    task = build(tmp_path, ROWS, kind="choice", **fields)
    metrics = dict(task.evaluate(subject()).metrics)
    end = [255] * ends_document
    table = np.array([[_log_prob(row["q"], _tokens(choice) + end) for choice in CHOICES] for row in ROWS])
    labels, lengths = [0, 1, 2], np.array([len(choice) for choice in CHOICES])
    assert metrics["acc"] == np.mean(table.argmax(1) == labels)
    assert metrics["acc_norm"] == np.mean((table / lengths).argmax(1) == labels)
    nats = -sum(table[row, label] for row, label in enumerate(labels))
    assert metrics["loss"] == pytest.approx(nats / (lengths.sum() + 3 * ends_document), rel=1e-9)
    assert metrics["cut_prompts"] == 0


def test_acc_norm_divides_by_bytes(tmp_path: Path) -> None:
    choices = ["oooo", "\u65e5\u672c\u8a9e", "\u00e9\u00e9"]
    log_probs = np.array([_log_prob("Which? ", [*_tokens(choice), 255]) for choice in choices])
    right = int((log_probs / [len(choice.encode()) for choice in choices]).argmax())
    assert right != (log_probs / [len(choice) for choice in choices]).argmax(), "or nothing could be told"
    task = build(tmp_path, [{"q": "Which? ", "right": right}], kind="choice", choices=choices, answer="right")
    assert task.evaluate(subject()).metrics["acc_norm"] == 1.0


def test_choices_can_be_each_rows_own(tmp_path: Path) -> None:
    rows = [
        {"q": "2 + 2 = ", "options": ["4", "22"], "right": 0},
        {"q": "1 + 1 = ", "options": ["3", "2", "1"], "right": "2"},
    ]
    task = build(tmp_path, rows, kind="choice", choices_column="options", answer="right")
    metrics = task.evaluate(subject()).metrics
    assert "macro_f1" not in metrics, "classes are not the same in every row"
    assert set(metrics) == {"acc", "acc_stderr", "acc_norm", "loss", "cut_prompts"}


def test_choices_with_columns_in_them_are_rendered(tmp_path: Path) -> None:
    rows = [{"q": "Who? ", "a": "Anna", "b": "Bo", "right": "it was Bo"}]
    task = build(tmp_path, rows, kind="choice", choices=["it was {a}", "it was {b}"], answer="right")
    same = build(
        tmp_path, [{"q": "Who? ", "right": 1}], kind="choice", choices=["it was Anna", "it was Bo"], answer="right"
    )
    assert task.fingerprint == same.fingerprint


def test_a_prompt_that_is_too_long_is_truncated_on_the_left_and_counted(tmp_path: Path) -> None:
    """The longest choice decides, so that all choices of a row follow the same prompt."""
    fields: dict[str, Any] = {"kind": "choice", "choices": ["a", "b" * 9], "answer": "right"}
    room = SEQ_LEN + 1 - 10  # nine bytes and the end of the document, of which the last is not read
    long, short = ({"q": "x" * length + "end ", "right": 0} for length in (500, room - 4))
    task = build(tmp_path, [long, {"q": "end ", "right": 0}], **fields)
    assert task.num_truncated == 1 and task.evaluate(subject()).metrics["cut_prompts"] == 1
    # Of the shorter one only the end of a document before it is cut.
    assert build(tmp_path, [long], **fields).fingerprint == build(tmp_path, [short], **fields).fingerprint


def test_examples_are_evenly_spaced_and_filtered_first(tmp_path: Path) -> None:
    rows = [{"q": f"{i} ", "right": 0, "keep": i % 2 == 0} for i in range(20)]
    fields: dict[str, Any] = {"kind": "choice", "choices": ["a", "b"], "answer": "right"}
    task = build(tmp_path, rows, filters=[{"column": "keep", "one_of": [True]}], max_examples=4, **fields)
    chosen = build(tmp_path, [rows[i] for i in (0, 4, 10, 14)], **fields)  # of 0 2 .. 18: number 0, 2, 5, 7
    assert task.num_examples == 4 and task.fingerprint == chosen.fingerprint
    everything = build(tmp_path, rows, max_examples=1000, **fields)
    assert everything.num_examples == 20 != task.num_examples


def test_metrics_equal_hand_computed_ones() -> None:
    log_probs = [[-1.0, -2.0], [-3.0, -3.0], [-5.0, -4.0], [-1.0, -9.0]]
    num_bytes = [[1, 4], [1, 1], [2, 1], [1, 1]]
    metrics = choice_metrics(log_probs, num_bytes, [0, 0, 1, 1])
    assert metrics["acc"] == 0.75, "of equal ones the first is chosen"
    assert metrics["acc_norm"] == 0.25  # per byte: -1 -0.5 | -3 -3 | -2.5 -4 | -1 -9
    assert metrics["acc_stderr"] == pytest.approx(math.sqrt(0.75 * 0.25 / 4))


def test_nan_is_never_right() -> None:
    assert choice_metrics([[math.nan, -1.0], [-1.0, math.nan]], [[1, 1], [1, 1]], [0, 0])["acc"] == 0.0


def test_macro_f1_is_the_mean_over_classes_that_occur() -> None:
    # class 0: precision 1/2, recall 1; class 1: 1 and 1/2; class 3: chosen once, never right
    assert macro_f1([0, 0, 1, 3], [0, 1, 1, 2]) == pytest.approx((2 / 3 + 2 / 3 + 0 + 0) / 4)
    assert macro_f1([1, 1], [1, 1]) == 1.0
