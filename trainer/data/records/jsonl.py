"""JSON Lines files as rows: strict, and every error with file and line."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.data.records.bad_records import BadRow
from trainer.data.records.base import ANOTHER_TYPE, Row, Rows, SourcePart, type_name
from trainer.data.sources import files
from trainer.data.sources.finding import JSON_LINES, find_files, taken_from_folders

MAX_ROW_BYTES = 128 << 20
"""Largest row; a file without line ends is no reason to fill the memory."""

_PART_BYTES = 16 << 20
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Lines(SourcePart):
    """Lines of a file that begin in a range of bytes."""

    path: Path
    start_byte: int
    first_line: int


class JsonlRows(Rows):
    """Files with one JSON object a line, plain, .gz or .zst; blank lines are no rows."""

    def __init__(self, path: str | Sequence[str]) -> None:
        self._path = path

    def files(self) -> list[Path]:
        """Return the files: paths in order, the matches of a glob sorted, each file once.

        Raises:
            DataError: if there are none where a path, glob or folder says.
        """
        return find_files(self._path, JSON_LINES)

    def taken(self) -> list[str]:
        """Return a line for each folder that files are taken from."""
        return taken_from_folders(self._path, JSON_LINES)

    def parts(self) -> list[Lines]:
        """Return pieces of 16 MB, cut behind a line; a compressed file is one.

        Raises:
            DataError: if a file cannot be read.
        """
        return [part for path in self.files() for part in _cut(path)]

    def entries(self, part: SourcePart) -> Iterator[Row | BadRow]:
        """Yield the rows of a part, or `file:line: reason` where a line is no JSON object in UTF-8 or a file has none.

        Raises:
            DataError: if the file cannot be read, or is damaged.
        """
        assert isinstance(part, Lines), "parts() gave it"
        has_rows = False
        for line, content, first_byte in _lines(part):
            row = _row(content, part.path, line=line, first_byte=first_byte)
            if row is not None:
                has_rows = True
                yield row
        if not has_rows and part.start_byte == 0 and _is_whole(part):
            yield no_rows(part.path)

    def __str__(self) -> str:
        return self._path if isinstance(self._path, str) else ", ".join(self._path)


def _cut(path: Path) -> Iterator[Lines]:
    with files.readable(path):
        size_bytes = path.stat().st_size
        if files.is_compressed(path) or size_bytes <= _PART_BYTES:
            yield Lines(size_bytes=size_bytes, path=path, start_byte=0, first_line=1)
            return
        start = position = 0
        line = first_line = 1
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                # A part ends with the chunk's last line, once it is long enough.
                end = chunk.rfind(b"\n") + 1
                if end and position + end - start >= _PART_BYTES and position + end < size_bytes:
                    line += chunk.count(b"\n")
                    yield Lines(size_bytes=position + end - start, path=path, start_byte=start, first_line=first_line)
                    start, first_line = position + end, line
                else:
                    line += chunk.count(b"\n")
                position += len(chunk)
        yield Lines(size_bytes=size_bytes - start, path=path, start_byte=start, first_line=first_line)


def _is_whole(part: Lines) -> bool:
    with files.readable(part.path):
        return part.size_bytes == part.path.stat().st_size


def _lines(part: Lines) -> Iterator[tuple[int, bytes, int]]:
    """Yield number, content and first byte of each line of a part."""
    ends_with_file = files.is_compressed(part.path)
    with files.readable(part.path), files.open_binary(part.path) as file:
        position, line = part.start_byte, part.first_line
        end = position + part.size_bytes
        if position:
            file.seek(position)
        while ends_with_file or position < end:
            content = file.readline(MAX_ROW_BYTES + 1)
            if not content:
                return
            yield line, content, position
            position += len(content)
            line += 1
            while len(content) > MAX_ROW_BYTES and not content.endswith(b"\n"):  # the rest of what is too large
                rest = file.readline(_CHUNK_BYTES)
                position += len(rest)
                if not rest or rest.endswith(b"\n"):
                    break


def _row(content: bytes, path: Path, *, line: int, first_byte: int) -> Row | BadRow | None:
    """Return the row of a line, or what is wrong with it; None for a blank one."""
    where = f"{path}:{line}"
    try:
        if len(content) > MAX_ROW_BYTES:
            raise too_large(where)
        text = files.decode(content, path, first_byte=first_byte, first_line=line)
        return Row(where, _parse(text, where=where)) if text.strip() else None
    except BadRow as bad:
        return bad


def too_large(where: str) -> BadRow:
    """Return the error for a row over the limit."""
    message = f"{where}: more than {MAX_ROW_BYTES} bytes in one row; that is the limit; split the row"
    return BadRow(message, reason=files.TOO_LARGE)


def no_rows(path: Path | str) -> BadRow:
    """Return the error for a file without rows."""
    message = f"{path}: holds no rows (empty or only white space); every file needs some; remove it"
    return BadRow(message, reason="a file without rows", file=path)


def _parse(text: str, *, where: str) -> dict[str, Any]:
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        reason = f"{error.msg} at column {error.colno}"
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; thousands of brackets
        reason = str(error)
    else:
        if isinstance(row, dict):
            return row
        message = f"{where}: the row is {type_name(row)}; every row is an object; correct or remove it"
        raise BadRow(message, reason=ANOTHER_TYPE)
    raise BadRow(
        f"{where}: not JSON ({reason}); every line is one JSON object; correct or remove it", reason="not JSON"
    )
