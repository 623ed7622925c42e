"""From rows to questions in tokens, and every way in which a row can be wrong."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from trainer.data.records.base import Row, type_name
from trainer.data.records.template import Template, check_unicode
from trainer.data.tokenizers.base import Tokenizer
from trainer.errors import DataError
from trainer.evaluation.tasks.registry import TaskConfig

_Example = TypeVar("_Example")


def read_examples(config: TaskConfig, make: Callable[[Row], _Example]) -> list[_Example]:
    """Return what `make` makes of the task's rows: of those that pass the filters, evenly spaced ones.

    Raises:
        DataError: naming file and row, if one is unusable, or if there is none.
    """

    def rows() -> Iterator[Row]:
        return (row for row in config.rows.rows().rows() if all(condition.keeps(row) for condition in config.filters))

    if config.max_examples is None:
        examples = [make(row) for row in rows()]
    else:  # read twice, so that what is not asked is not kept
        num_rows = sum(1 for _ in rows())
        limit = min(num_rows, config.max_examples)
        asked = {i * num_rows // limit for i in range(limit)}
        examples = [make(row) for number, row in enumerate(rows()) if number in asked]
    if not examples:
        raise DataError(f"eval.tasks: {config.name}: no row passes its filters; it needs some; correct the filters")
    return examples


def prompt_tokens(prompt: Template, row: Row, tokenizer: Tokenizer) -> list[int]:
    """Return the tokens of a prompt, behind the end of a document: here another one begins."""
    return [tokenizer.end_of_document, *tokenizer.encode(prompt.render(row)).tolist()]


def completion_tokens(text: str, tokenizer: Tokenizer, *, ends_document: bool) -> list[int]:
    """Return the tokens of a text that follows a prompt."""
    return tokenizer.encode(text).tolist() + [tokenizer.end_of_document] * ends_document


def texts_in(row: Row, column: str) -> list[str]:
    """Return the list of texts in a column.

    Raises:
        DataError: if it is none, or one of its entries is none.
    """
    values = row.value(column)
    if not isinstance(values, list):
        raise _wrong(row, column, values, "a list of strings")
    for value in values:
        if not isinstance(value, str):
            raise DataError(
                f"{row.where}: {column!r} has {type_name(value)} in it; all of it must be strings; correct or remove "
                "the row"
            )
    return [check_unicode(value, column, where=row.where) for value in values]


def check_options(texts: Sequence[str], *, where: str, what: str) -> None:
    """Refuse options that nobody can choose from.

    Raises:
        DataError: if there are fewer than two, or one is empty or there twice.
    """
    if len(texts) < 2:
        raise DataError(
            f"{where}: has too few {what} ({len(texts)}); two are needed to choose from; correct or remove the row"
        )
    seen: set[str] = set()
    for text in texts:
        if not text:
            raise DataError(f"{where}: one of its {what} is empty; each needs some text; correct or remove the row")
        if text in seen:
            raise DataError(f"{where}: {text!r} is twice among its {what}; each once; correct or remove the row")
        seen.add(text)


def place_of(value: Any, texts: Sequence[str], row: Row, column: str) -> int:
    """Return which of the texts a value names: by its number, from 0, or by its text, white space around it apart.

    Raises:
        DataError: if it names none, or several.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        if 0 <= value < len(texts):
            return value
        raise DataError(
            f"{row.where}: {column!r} is {value}; the {len(texts)} texts to choose from have the numbers 0 to "
            f"{len(texts) - 1}; correct or remove the row"
        )
    if not isinstance(value, str):
        raise _wrong(row, column, value, "a whole number or a string")
    found = [i for i, text in enumerate(texts) if text == value] or [
        i for i, text in enumerate(texts) if text.strip() == value.strip()
    ]
    if len(found) != 1:
        how = "is none" if not found else f"is {len(found)}"
        raise DataError(
            f"{row.where}: {column!r} is {_short(value)}, which {how} of the texts to choose from "
            f"({', '.join(map(_short, texts[:4]))}{', ...' if len(texts) > 4 else ''}); correct or remove the row"
        )
    return found[0]


def fingerprint_of(*parts: object) -> str:
    """Return the hash of a task's name and questions, which are JSON values."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(json.dumps(part).encode() + b"\n")
    return digest.hexdigest()


def _wrong(row: Row, column: str, value: Any, needed: str) -> DataError:
    return DataError(f"{row.where}: {column!r} is {type_name(value)}; it must be {needed}; correct or remove the row")


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:37]}...")
