"""Turn records into tokenized questions, and reject records that no question can be made of."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from trainer.data.records.base import Record, RecordReader, type_name
from trainer.data.records.template import Template, check_unicode
from trainer.data.tokenizers.base import Tokenizer
from trainer.errors import DataError

_Example = TypeVar("_Example")


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskRecords:
    """The records that a task's questions are made of."""

    task: str
    source: RecordReader
    filters: Sequence[Callable[[Record], bool]] = ()
    """A record is used if all of these accept it."""
    max_examples: int | None = None
    """Use at most this many evenly spaced records; None: all."""

    def examples(self, make: Callable[[Record], _Example]) -> list[_Example]:
        """Make one example of each record that is used; raise `DataError` if no record passes the filters."""
        if self.max_examples is None:
            examples = [make(row) for row in self._accepted()]
        else:  # two passes, so that unused records are not kept in memory
            num_rows = sum(1 for _ in self._accepted())
            limit = min(num_rows, self.max_examples)
            used = {i * num_rows // limit for i in range(limit)}
            examples = [make(row) for number, row in enumerate(self._accepted()) if number in used]
        if not examples:
            raise DataError(f"eval.tasks: {self.task}: no row passes its filters; it needs some; correct the filters")
        return examples

    def _accepted(self) -> Iterator[Record]:
        return (row for row in self.source.records() if all(accepts(row) for accepts in self.filters))


def prompt_tokens(prompt: Template, row: Record, tokenizer: Tokenizer) -> list[int]:
    """Tokenize a prompt, after an end-of-document token: it begins a document."""
    return [tokenizer.end_of_document, *tokenizer.encode(prompt.render(row)).tolist()]


def completion_tokens(text: str, tokenizer: Tokenizer, *, ends_document: bool) -> list[int]:
    """Tokenize a text that follows a prompt."""
    return tokenizer.encode(text).tolist() + [tokenizer.end_of_document] * ends_document


def text_list(row: Record, column: str) -> list[str]:
    """Return the list of strings in a column, or raise `DataError`."""
    values = row.value(column)
    if not isinstance(values, list):
        raise _wrong(row, f"{column!r} is {type_name(values)}; it must be a list of strings")
    for value in values:
        if not isinstance(value, str):
            raise _wrong(row, f"{column!r} contains {type_name(value)}; every entry must be a string")
    return [check_unicode(value, column, where=row.where) for value in values]


def check_options(texts: Sequence[str], *, where: str, what: str) -> None:
    """Raise `DataError` if there are fewer than two texts to choose from, or one is empty or repeated."""
    if len(texts) < 2:
        raise DataError(f"{where}: has too few {what} ({len(texts)}); at least 2 are needed; correct or remove the row")
    seen: set[str] = set()
    for text in texts:
        if not text:
            raise DataError(f"{where}: one of its {what} is empty; each needs some text; correct or remove the row")
        if text in seen:
            raise DataError(
                f"{where}: {text!r} is repeated in its {what}; each must be unique; correct or remove the row"
            )
        seen.add(text)


def option_index(value: Any, texts: Sequence[str], row: Record, column: str) -> int:
    """Return the index of the one text that a value names, by 0-based number or stripped text, or raise `DataError`."""
    if isinstance(value, int) and not isinstance(value, bool):
        if 0 <= value < len(texts):
            return value
        last = len(texts) - 1
        raise _wrong(row, f"{column!r} is {value}; the {len(texts)} texts to choose from are numbered 0 to {last}")
    if not isinstance(value, str):
        raise _wrong(row, f"{column!r} is {type_name(value)}; it must be a whole number or a string")
    found = [i for i, text in enumerate(texts) if text == value]
    found = found or [i for i, text in enumerate(texts) if text.strip() == value.strip()]
    if len(found) != 1:
        problem = "is none" if not found else f"matches {len(found)}"
        listed = ", ".join(map(_short, texts[:4])) + (", ..." if len(texts) > 4 else "")
        raise _wrong(row, f"{column!r} is {_short(value)}, which {problem} of the texts to choose from ({listed})")
    return found[0]


def hash_questions(*parts: object) -> str:
    """Return the hash of a task's name and questions, which are JSON values."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(json.dumps(part).encode() + b"\n")
    return digest.hexdigest()


def _wrong(row: Record, problem: str) -> DataError:
    return DataError(f"{row.where}: {problem}; correct or remove the row")


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:37]}...")
