"""Strict reader of JSON Lines files; errors name file and line."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config.nodes import shown
from trainer.data.records import text_files
from trainer.data.records.bad_records import BadRecord
from trainer.data.records.base import WRONG_TYPE, Record, RecordReader, SourcePart, type_name
from trainer.data.records.find_files import JSON_LINES, describe_folders, find_files

MAX_RECORD_BYTES = 128 << 20  # largest record: a file without line ends must not fill the memory

_PART_BYTES = 16 << 20
_CHUNK_BYTES = 1 << 20
_MakeObject = Callable[[list[tuple[str, Any]]], dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class LineRange(SourcePart):
    """The lines of a file that begin in a range of bytes."""

    path: Path
    start_byte: int
    first_line: int


class JsonlReader(RecordReader):
    """Reads files with one JSON object a line, plain, .gz or .zst; blank lines are ignored."""

    def __init__(self, path: str | Sequence[str], *, unique_keys: bool = False) -> None:
        """Create the reader; `unique_keys` makes an object with a key twice a bad record."""
        self._path = path
        self._make_object = _unique_keys if unique_keys else None

    def files(self) -> list[Path]:
        """Return the files: paths in order, the matches of a glob sorted, each file once."""
        return find_files(self._path, JSON_LINES)

    def folder_notes(self) -> list[str]:
        """Return a line for each folder: which of its files are read and which are not."""
        return describe_folders(self._path, JSON_LINES)

    def parts(self) -> list[LineRange]:
        """Return pieces of about 16 MB that end with a line; a compressed file is one piece."""
        return [part for path in self.files() for part in _split_file(path)]

    def entries(self, part: SourcePart) -> Iterator[Record | BadRecord]:
        """Yield the records of a part; a line that is not a JSON object in UTF-8, or a file without records, is bad."""
        assert isinstance(part, LineRange), "parts() gave it"
        has_records = False
        for line, content, first_byte in _lines(part):
            record = _record(content, part.path, self._make_object, line=line, first_byte=first_byte)
            if record is not None:
                has_records = True
                yield record
        if not has_records and part.start_byte == 0:
            with text_files.readable(part.path):
                is_whole_file = part.size_bytes == part.path.stat().st_size
            if is_whole_file:
                yield no_records(part.path)

    def __str__(self) -> str:
        return self._path if isinstance(self._path, str) else ", ".join(self._path)


def _split_file(path: Path) -> Iterator[LineRange]:
    with text_files.readable(path):
        size_bytes = path.stat().st_size
        if text_files.is_compressed(path) or size_bytes <= _PART_BYTES:
            yield LineRange(size_bytes=size_bytes, path=path, start_byte=0, first_line=1)
            return
        start = position = 0
        line = first_line = 1
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                # A part ends with the last line of a chunk, once it is long enough.
                end = chunk.rfind(b"\n") + 1
                line += chunk.count(b"\n")
                if end and position + end - start >= _PART_BYTES and position + end < size_bytes:
                    size = position + end - start
                    yield LineRange(size_bytes=size, path=path, start_byte=start, first_line=first_line)
                    start, first_line = position + end, line
                position += len(chunk)
        yield LineRange(size_bytes=size_bytes - start, path=path, start_byte=start, first_line=first_line)


def _lines(part: LineRange) -> Iterator[tuple[int, bytes, int]]:
    """Yield line number, content and first byte of each line of a part."""
    ends_with_file = text_files.is_compressed(part.path)
    with text_files.readable(part.path), text_files.open_binary(part.path) as file:
        position, line = part.start_byte, part.first_line
        end = position + part.size_bytes
        if position:
            file.seek(position)
        while ends_with_file or position < end:
            content = file.readline(MAX_RECORD_BYTES + 1)
            if not content:
                return
            yield line, content, position
            position += len(content)
            line += 1
            while len(content) > MAX_RECORD_BYTES and not content.endswith(b"\n"):  # skip the rest of a long line
                rest = file.readline(_CHUNK_BYTES)
                position += len(rest)
                if not rest or rest.endswith(b"\n"):
                    break


def _record(
    content: bytes, path: Path, make_object: _MakeObject | None, *, line: int, first_byte: int
) -> Record | BadRecord | None:
    """Return the record of a line, or its error; None for a blank line."""
    where = f"{path}:{line}"
    try:
        if len(content) > MAX_RECORD_BYTES:
            raise too_large(where)
        text = text_files.decode(content, path, first_byte=first_byte, first_line=line)
        return Record(where, _parse(text, make_object, where=where)) if text.strip() else None
    except BadRecord as bad:
        return bad


def too_large(where: str) -> BadRecord:
    """Return the error for a record over the limit."""
    message = f"{where}: more than {MAX_RECORD_BYTES} bytes in one record; that is the limit; split the record"
    return BadRecord(message, reason=text_files.TOO_LARGE)


def no_records(path: Path | str) -> BadRecord:
    """Return the error for a file without records."""
    message = f"{path}: holds no records (empty or only white space); every file needs some; remove it"
    return BadRecord(message, reason="a file without records", file=path)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"an object has the key {shown(twice)} twice")
    return values


def _parse(text: str, make_object: _MakeObject | None, *, where: str) -> dict[str, Any]:
    try:
        record = json.loads(text, object_pairs_hook=make_object)
    except json.JSONDecodeError as error:
        reason = f"{error.msg} at column {error.colno}"
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; thousands of brackets
        reason = str(error)
    else:
        if isinstance(record, dict):
            return record
        message = f"{where}: the record is {type_name(record)}; every record is an object; correct or remove it"
        raise BadRecord(message, reason=WRONG_TYPE)
    message = f"{where}: not JSON ({reason}); every line is one JSON object; correct or remove it"
    raise BadRecord(message, reason="not JSON")
