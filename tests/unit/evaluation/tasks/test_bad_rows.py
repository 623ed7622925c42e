"""Tests for unusable rows: an error of one line with file and row, before training."""

from pathlib import Path
from typing import Any

import pytest

from tests.unit.evaluation.task_helpers import build
from trainer.errors import DataError

CHOICE: dict[str, Any] = {"kind": "choice", "choices": ["yes", "no"], "answer": "a"}
OWN: dict[str, Any] = {"kind": "choice", "choices_column": "c", "answer": "a"}
RANKING: dict[str, Any] = {"kind": "ranking", "candidates_column": "c", "relevant": "a", "k": [1, 2]}
WRITING: dict[str, Any] = {"kind": "generation", "references": ["{r}"]}

GOOD = {"q": "q", "a": 0, "c": ["x", "y", "z"], "r": "r"}
BAD: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no column of the prompt": (
        CHOICE,
        {"q": ...},
        "no column 'q'; the record has a, c, r; correct the name or the record",
    ),
    "no column of the answer": (
        {**CHOICE, "answer": "rr"},
        {},
        "no column 'rr'; the record has q, a, c, r (did you mean 'r'?); correct the name or the record",
    ),
    "answer out of range": (
        CHOICE,
        {"a": 2},
        "'a' is 2; the 2 texts to choose from are numbered 0 to 1; correct or remove the row",
    ),
    "negative answer": (
        CHOICE,
        {"a": -1},
        "'a' is -1; the 2 texts to choose from are numbered 0 to 1; correct or remove the row",
    ),
    "answer is not among the choices": (
        CHOICE,
        {"a": "maybe"},
        "'a' is 'maybe', which is none of the texts to choose from ('yes', 'no'); correct or remove the row",
    ),
    "answer of another type": (
        CHOICE,
        {"a": True},
        "'a' is a boolean; it must be a whole number or a string; correct or remove the row",
    ),
    "answer is a fraction": (
        CHOICE,
        {"a": 0.5},
        "'a' is a number; it must be a whole number or a string; correct or remove the row",
    ),
    "answer could be two of them": (
        OWN,
        {"c": ["a ", " a", "b"], "a": "a"},
        "'a' is 'a', which matches 2 of the texts to choose from ('a ', ' a', 'b'); correct or remove the row",
    ),
    "no choices": (OWN, {"c": []}, "has too few choices (0); at least 2 are needed; correct or remove the row"),
    "one choice": (
        OWN,
        {"c": ["x"]},
        "has too few choices (1); at least 2 are needed; correct or remove the row",
    ),
    "an empty choice": (
        OWN,
        {"c": ["x", ""]},
        "one of its choices is empty; each needs some text; correct or remove the row",
    ),
    "equal choices": (
        OWN,
        {"c": ["x", "x"]},
        "'x' is repeated in its choices; each must be unique; correct or remove the row",
    ),
    "choices are no list": (
        OWN,
        {"c": "x, y"},
        "'c' is a string; it must be a list of strings; correct or remove the row",
    ),
    "a choice is no text": (
        OWN,
        {"c": ["x", 7]},
        "'c' contains a number; every entry must be a string; correct or remove the row",
    ),
    "half a character": (
        OWN,
        {"c": ["x", "\ud83d"]},
        "'c' has the lone surrogate \\ud83d at character 0; text must be valid Unicode; correct or remove the record",
    ),
    "choices that are equal once rendered": (
        {**CHOICE, "choices": ["{r}", "{q}"]},
        {"q": "r"},
        "'r' is repeated in its choices; each must be unique; correct or remove the row",
    ),
    "k beyond the candidates": (
        {**RANKING, "k": [1, 10]},
        {},
        "has 3 candidates, and eval.tasks: task: k has 10; use a smaller k or more candidates",
    ),
    "nothing relevant": (
        RANKING,
        {"a": []},
        "'a' is empty; at least one relevant candidate is needed; correct or remove the row",
    ),
    "relevant is not among the candidates": (
        RANKING,
        {"a": ["x", "w"]},
        "'a' is 'w', which is none of the texts to choose from ('x', 'y', 'z'); correct or remove the row",
    ),
    "a choice longer than a row of the model": (
        OWN,
        {"c": ["x", "y" * 64]},
        "the text to score has 65 tokens, and model.seq_len is 64; shorten the text or remove the row",
    ),
    "an empty reference": (
        WRITING,
        {"r": " "},
        "'{r}' is empty or only white space; every reference needs some text; correct or remove the row",
    ),
    "a reference of another type": (
        WRITING,
        {"r": 5},
        "'r' is a number; it must be a string; correct or remove the record",
    ),
}


@pytest.mark.parametrize(("fields", "change", "message"), BAD.values(), ids=BAD.keys())
def test_a_bad_row_is_named(tmp_path: Path, fields: dict[str, Any], change: dict[str, Any], message: str) -> None:
    row = {key: value for key, value in {**GOOD, **change}.items() if value is not ...}
    first = GOOD if max(fields.get("k", [0])) < 10 and fields.get("answer") != "rr" else row
    with pytest.raises(DataError) as caught:
        build(tmp_path, [first, row], **fields)
    line = 2 if first is GOOD else 1
    assert str(caught.value) == f"{tmp_path}/rows.jsonl:{line}: {message}"


def test_filters_that_reject_all_rows_are_an_error(tmp_path: Path) -> None:
    filters = [{"column": "q", "one_of": ["other"]}]
    with pytest.raises(
        DataError, match=r"^eval\.tasks: task: no row passes its filters; it needs some; correct the fil"
    ):
        build(tmp_path, [GOOD], filters=filters, **CHOICE)


def test_a_file_without_rows_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl: holds no records"):
        build(tmp_path, [], **CHOICE)


def test_a_file_of_candidates_is_checked_as_a_whole(tmp_path: Path) -> None:
    fields = {"kind": "ranking", "candidates_file": str(tmp_path / "items.txt"), "relevant": "a", "k": [1]}
    with pytest.raises(DataError, match=r"items\.txt: no such file; "):
        build(tmp_path, [GOOD], **fields)
    (tmp_path / "items.txt").write_text("a\r\nb\na\n")
    with pytest.raises(DataError, match=r"items\.txt: 'a' is repeated in its candidates; each must be unique"):
        build(tmp_path, [GOOD], **fields)


def test_a_candidate_that_is_too_long_is_named_instead_of_a_row(tmp_path: Path) -> None:
    (tmp_path / "items.txt").write_text("a\n" + "b" * 500 + "\n")
    fields = {"kind": "ranking", "candidates_file": str(tmp_path / "items.txt"), "relevant": "a", "k": [1]}
    with pytest.raises(DataError, match=r"items\.txt: 'b{40}': the text to score has 501 tokens"):
        build(tmp_path, [GOOD], **fields)


def test_an_empty_prompt_is_allowed(tmp_path: Path) -> None:
    assert build(tmp_path, [{**GOOD, "q": ""}], **CHOICE).num_examples == 1
