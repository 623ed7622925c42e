"""Metrics on disk: one JSON object a line, valid to its last line whatever happens to the run."""

import json
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from trainer import faults
from trainer.durable import NotRegular, open_own
from trainer.errors import DataError

_LONGEST_BYTES = 16 << 20  # of a line; a record of a thousand layers of a thousand experts has less
_BLOCK_BYTES = 1 << 20


class JsonlSink:
    """Appends records to a file, a line each, so that a reader sees every record as soon as it is written.

    Values may be None, bool, numbers, strings, lists and mappings of them, and numpy scalars and arrays. A number that
    is not finite is written as null, because JSON has none. When a write fails (a full disk), the sink warns once,
    leaves no part of the record behind, and tries again with the next one.

    Args:
        path: The file; its folder is made if it is not there.
        warn: What is called with the one warning.

    Raises:
        DataError: if something else has its name, such as a link or a pipe.
        OSError: if the file cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str], *, warn: Callable[[str], None] | None = None) -> None:
        self.path = Path(path)
        self._warn = warn or _warn
        self._warned = False
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._descriptor = _open(self.path)
        except NotRegular:
            raise DataError(f"{self.path}: is no regular file; remove it, it is not ours") from None
        _cut_half_line(self.path, self._descriptor)

    def write(self, record: Mapping[str, object]) -> None:
        """Append `record`; it is in the hands of the operating system on return."""
        line = (json.dumps(_plain(record), allow_nan=False) + "\n").encode()
        start = None
        try:
            start = os.fstat(self._descriptor).st_size
            # One call, unbuffered: a process that is killed leaves the whole line or none of it.
            if os.write(self._descriptor, line) < len(line):
                raise OSError("only a part of the line was written")
        except OSError as error:
            self._warn_once(error)
            if start is not None:
                self._cut(start)

    def resume_at(self, step: int) -> None:
        """Forget what a run that resumes from completed step `step` will log again.

        Every record whose `step` is greater goes, and so does a line that is not a record. The file is replaced in one
        move, so a crash leaves the old one or the new one.
        """
        try:
            if all(_is_kept(line, step) for line in _lines(self.path)):
                return
            temporary = self.path.with_name(self.path.name + ".tmp")
            temporary.unlink(missing_ok=True)
            with temporary.open("xb") as file:
                file.writelines(line for line in _lines(self.path) if _is_kept(line, step))
                file.flush()
                os.fsync(file.fileno())
            faults.hit("metrics.cut")
            temporary.replace(self.path)
            os.close(self._descriptor)
            self._descriptor = _open(self.path)
        except OSError as error:
            self._warn_once(error)

    def close(self) -> None:
        """Close the file; closing twice does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _cut(self, size_bytes: int) -> None:
        try:
            os.ftruncate(self._descriptor, size_bytes)
        except OSError as error:
            self._warn_once(error)

    def _warn_once(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            reason = error.strerror or str(error)
            self._warn(f"{self.path}: cannot write metrics: {reason}; training goes on, records are lost until it can")


def read_jsonl(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return the records of a file written by `JsonlSink`, also while it is being written.

    Raises:
        DataError: if a line is not a JSON object. A last line without its newline is still being written and left out.
        OSError: if the file cannot be read.
    """
    return list(_records(Path(path)))


def _records(path: Path) -> Iterator[dict[str, Any]]:
    for index, line in enumerate(_lines(path)):
        if not line.endswith(b"\n"):
            return
        record = _parse(line)
        if record is None:
            raise DataError(f"{path}:{index + 1}: is not a JSON object; remove the line, or the file if it is not ours")
        yield record


def _lines(path: Path) -> Iterator[bytes]:
    """Yield lines with their ends; one that is longer than any of ours comes in pieces, of which none is a record."""
    with path.open("rb") as file:
        while line := file.readline(_LONGEST_BYTES):
            yield line


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # also a line that is not UTF-8, or is nested deeply
        return None
    return record if isinstance(record, dict) else None


def _is_kept(line: bytes, step: int) -> bool:
    record = _parse(line)
    if record is None or not line.endswith(b"\n"):
        return False
    recorded = record.get("step")
    return not isinstance(recorded, int | float) or recorded <= step


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if hasattr(value, "tolist"):  # numpy
        return _plain(value.tolist())
    return value


def _open(path: Path) -> int:
    return open_own(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)


def _cut_half_line(path: Path, descriptor: int) -> None:
    # The rest of a line that a killed process began; appending to it would spoil the next record as well.
    size_bytes = end = os.fstat(descriptor).st_size
    with path.open("rb") as file:
        while end > 0:
            start = max(0, end - _BLOCK_BYTES)
            file.seek(start)
            found = file.read(end - start).rfind(b"\n")
            if found >= 0:
                end = start + found + 1
                break
            end = start
    if end < size_bytes:
        os.ftruncate(descriptor, end)


def _warn(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=2)
