"""JSON Lines files as rows: strict, and every error with file and line."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.data.rows.base import Part, Row, Rows, type_name
from trainer.data.sources import files
from trainer.errors import DataError

MAX_ROW_BYTES = 128 << 20
"""Largest row; a file without line ends is no reason to fill the memory."""

_PART_BYTES = 16 << 20
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Lines(Part):
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
            DataError: if a path is missing or a folder, or a glob matches no file.
        """
        return files.find_files(self._path)

    def parts(self) -> list[Lines]:
        """Return pieces of 16 MB, cut behind a line; a compressed file is one.

        Raises:
            DataError: if a file cannot be read.
        """
        return [part for path in self.files() for part in _cut(path)]

    def read(self, part: Part) -> Iterator[Row]:
        """Yield the rows of a part.

        Raises:
            DataError: as `file:line: reason`, if a line is not a JSON object in UTF-8, or a whole file has no row.
        """
        assert isinstance(part, Lines), "parts() gave it"
        has_rows = False
        for line, content, first_byte in _lines(part):
            where = f"{part.path}:{line}"
            text = files.decode(content, part.path, first_byte=first_byte, first_line=line)
            if text.strip():
                has_rows = True
                yield Row(where, _parse(text, where=where))
        if not has_rows and part.start_byte == 0 and _is_whole(part):
            raise DataError(f"{part.path}: holds no rows (empty or only white space); every file needs some; remove it")

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
            if len(content) > MAX_ROW_BYTES:
                raise DataError(
                    f"{part.path}:{line}: more than {MAX_ROW_BYTES} bytes in one row; that is the limit; split the row"
                )
            yield line, content, position
            position += len(content)
            line += 1


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
        raise DataError(f"{where}: the row is {type_name(row)}; every row is an object; correct or remove it")
    raise DataError(f"{where}: not JSON ({reason}); every line is one JSON object; correct or remove it")
