"""Metrics on disk: one JSON object a line, valid to its last line whatever happens to the run."""

import json
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from trainer import faults
from trainer.errors import DataError


class JsonlSink:
    """Appends records to a file, a line each, so that a reader sees every record as soon as it is written.

    Values may be None, bool, numbers, strings, lists and mappings of them, and numpy scalars and arrays. A number that
    is not finite is written as null, because JSON has none. When a write fails (a full disk), the sink warns once,
    leaves no part of the record behind, and tries again with the next one.

    Args:
        path: The file; its folder is made if it is not there.
        warn: What is called with the one warning.

    Raises:
        OSError: if the file cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str], *, warn: Callable[[str], None] | None = None) -> None:
        self.path = Path(path)
        self._warn = warn or _warn
        self._warned = False
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = _open(self.path)
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
            lines = self.path.read_bytes().splitlines(keepends=True)
            kept = [line for line in lines if _is_kept(line, step)]
            if len(kept) == len(lines):
                return
            temporary = self.path.with_name(self.path.name + ".tmp")
            with temporary.open("wb") as file:
                file.writelines(kept)
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
    for index, line in enumerate(path.read_bytes().splitlines(keepends=True)):
        if not line.endswith(b"\n"):
            return
        record = _parse(line)
        if record is None:
            raise DataError(f"{path}:{index + 1}: is not a JSON object; remove the line, or the file if it is not ours")
        yield record


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:  # also a line that is not UTF-8
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


class NullSink:
    """Takes records and keeps none: for ranks that do not write."""

    def write(self, record: Mapping[str, object]) -> None:
        """Forget a record."""

    def resume_at(self, step: int) -> None:
        """Forget nothing."""


def _open(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)


def _cut_half_line(path: Path, descriptor: int) -> None:
    # The rest of a line that a killed process began; appending to it would spoil the next record as well.
    data = path.read_bytes()
    if data and not data.endswith(b"\n"):
        os.ftruncate(descriptor, data.rfind(b"\n") + 1)


def _warn(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=2)
