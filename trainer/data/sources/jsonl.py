"""JSON Lines files as documents."""

import difflib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from trainer.data.sources import files
from trainer.data.sources.base import Document, Source
from trainer.data.sources.registry import Domain, JsonlSourceConfig
from trainer.errors import DataError

_DOMAIN = TypeAdapter(Domain)
_SURROGATE = re.compile("[\ud800-\udfff]")
_JSON_TYPES = {
    type(None): "null",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    str: "a string",
    list: "a list",
}


class JsonlSource(Source):
    """Files with one JSON object a line, plain or .gz; each line is one document, blank lines are none."""

    def __init__(self, config: JsonlSourceConfig) -> None:
        self.weight = config.weight
        self._config = config

    def files(self) -> list[Path]:
        """Return the files: paths in order, the matches of a glob sorted, each file once.

        Raises:
            DataError: if a path is missing or a folder, or a glob matches no file.
        """
        return files.find_files(self._config.path)

    def documents(self) -> Iterator[Document]:
        """Yield each row's text.

        Raises:
            DataError: as `file:line: reason`, if a row is not an object with text, or a file has no row.
        """
        for path in self.files():
            num_rows = 0
            for line, row in _rows(path):
                num_rows += 1
                yield self._document(row, where=f"{path}:{line}")
            if num_rows == 0:
                raise DataError(f"{path}: holds no rows (empty or only white space); every file needs some; remove it")

    def _document(self, row: Any, *, where: str) -> Document:
        if not isinstance(row, dict):
            raise DataError(f"{where}: the row is {_json_type(row)}; every row is an object; correct or remove it")
        text = _string(row, self._config.text_key, option="text_key", where=where)
        if not text.strip():
            raise DataError(
                f"{where}: {self._config.text_key!r} holds no text (empty or only white space); every row needs some; "
                "remove it"
            )
        # JSON can escape half of a surrogate pair, which no encoding of text can hold.
        if not text.isascii() and (half := _SURROGATE.search(text)):
            raise DataError(
                f"{where}: {self._config.text_key!r} has the lone surrogate \\u{ord(half[0]):04x} at character "
                f"{half.start()}; text must be valid Unicode; correct or remove the row"
            )
        domain = self._config.domain
        if self._config.domain_key is not None:
            domain = _string(row, self._config.domain_key, option="domain_key", where=where)
            try:
                _DOMAIN.validate_python(domain)
            except ValidationError as error:
                raise DataError(
                    f"{where}: domain {domain!r} is no name; names are 1 to 64 letters, digits, dots, dashes and "
                    "underscores; correct the row or set another domain_key"
                ) from error
        return Document(name=where, domain=domain, text=text)


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield (line number from 1, parsed row) for every line that is not blank."""
    first_byte = 0
    with files.readable(path), files.open_binary(path) as file:
        line = 0
        while content := file.readline(files.MAX_DOCUMENT_BYTES + 1):
            line += 1
            where = f"{path}:{line}"
            if len(content) > files.MAX_DOCUMENT_BYTES:
                raise DataError(
                    f"{where}: more than {files.MAX_DOCUMENT_BYTES} bytes in one row; that is the limit; split the row"
                )
            text = files.decode(content, path, first_byte=first_byte, first_line=line)
            first_byte += len(content)
            if text.strip():
                yield line, _parse(text, where=where)


def _parse(text: str, *, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        reason = f"{error.msg} at column {error.colno}"
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; thousands of brackets
        reason = str(error)
    raise DataError(f"{where}: not JSON ({reason}); every line is one JSON object; correct or remove it")


def _string(row: dict[str, Any], key: str, *, option: str, where: str) -> str:
    if key not in row:
        has = ", ".join(list(row)[:8]) or "no keys"
        close = difflib.get_close_matches(key, row, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise DataError(f"{where}: no key {key!r}; the row has {has}{hint}; set {option} or correct the row")
    value = row[key]
    if not isinstance(value, str):
        raise DataError(f"{where}: {key!r} is {_json_type(value)}; it must be a string; correct or remove the row")
    return value


def _json_type(value: Any) -> str:
    return _JSON_TYPES.get(type(value), "an object")
