"""Append metrics to a JSONL file that stays valid whatever happens to the run."""

import json
import math
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trainer.atomic_io import NotRegular, is_open_file, open_unshared
from trainer.errors import DataError
from trainer.metrics.log_content import LogContent, content_of, copy_content, write_whole
from trainer.metrics.records import is_kept, parse_record, read_lines

_BLOCK_BYTES = 1 << 20


class JsonlSink:
    """Appends records to a file, one line each, visible to readers at once.

    Values may be None, bool, numbers, strings, lists and mappings of them, and numpy scalars and arrays. Numbers that
    are not finite are written as null, because JSON has none. If a write fails (a full disk), the sink warns once,
    leaves no partial record behind, and tries again with the next record. If the file is removed, replaced or truncated
    by others, this is noticed before the next record: a removed file is restored, lost lines are counted.

    Args:
        path: The file; its folder is created if necessary.
        warn: Called with each warning.

    Raises:
        DataError: if the path is not a regular file, such as a link or a pipe.
        OSError: if the file cannot be opened.
    """

    def __init__(self, path: Path, *, warn: Callable[[str], None] = warnings.warn) -> None:
        self.path, self._warn = path, warn
        self._warned: set[str] = set()
        self._cached: LogContent | None = None
        self._is_torn = False  # the file ends with a partial record that could not be removed yet
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._descriptor = _open(self.path)
        except NotRegular:
            raise DataError(f"{self.path}: is not a regular file; remove it, it is not ours") from None
        self._is_watched = is_open_file(self.path, self._descriptor)  # if the file system can tell
        _cut_half_line(self._descriptor)

    def write(self, record: Mapping[str, object]) -> None:
        """Append `record`; it has reached the operating system on return."""
        line = (json.dumps(_plain(record), allow_nan=False) + "\n").encode()
        self._attempt(self._check_file)
        if not self._is_torn:
            self._attempt(lambda: self._append(line))

    def content(self) -> LogContent:
        """Check the file and return its content, for a checkpoint."""
        self._attempt(self._check_file)
        return self._content

    def resume_at(self, step: int, saved: LogContent | None = None) -> None:
        """Drop the records after step `step`, which a resumed run will log again, and lines that are not records.

        The file is truncated, or replaced atomically. It is read a line at a time; the part that is unchanged since the
        checkpoint, where it had the content `saved`, is not parsed. Losses since then are reported.
        """
        self._attempt(lambda: self._resume_at(step, saved))

    def close(self) -> None:
        """Close the file; closing twice does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    @property
    def _content(self) -> LogContent:
        """Content of the file as of the last write or check."""
        if self._cached is None:
            self._cached = content_of(self._descriptor, os.fstat(self._descriptor).st_size)
        return self._cached

    def _append(self, line: bytes) -> None:
        try:
            write_whole(self._descriptor, line)
        except OSError:
            self._is_torn = True
            self._remove_torn()
            raise
        self._content.add(line)

    def _remove_torn(self) -> None:
        """Remove the partial record of a failed write, onto which the next one would be appended."""
        if self._is_torn:
            os.ftruncate(self._descriptor, self._content.size_bytes)
            self._is_torn = False

    def _check_file(self) -> None:
        self._remove_torn()
        if self._is_watched and not is_open_file(self.path, self._descriptor):
            if os.path.lexists(self.path):
                self._reopen()
            else:
                self._restore()
        elif os.fstat(self._descriptor).st_size != self._content.size_bytes:
            self._recount()

    def _restore(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._replace(lambda target: copy_content(self._descriptor, self._content, target))
        self._warn(f"{self.path}: was removed during the run; its {self._content.lines} lines are restored")

    def _reopen(self) -> None:
        """Continue in a file that was put in place of this one."""
        descriptor, had = _open(self.path), self._content.lines
        os.close(self._descriptor)
        self._descriptor, self._cached = descriptor, None
        _cut_half_line(descriptor)
        has = f"it has {self._content.lines} lines, and had {had}"
        self._warn(f"{self.path}: was replaced by another file during the run; {has}")

    def _recount(self) -> None:
        had, self._cached = self._content.lines, None
        _cut_half_line(self._descriptor)
        now = self._content.lines
        if now < had:
            self._warn(f"{self.path}: was truncated during the run; {had - now} of {had} lines are lost")
        else:
            self._warn_once("another process writes to it", f"; {now - had} lines are not the run's")

    def _resume_at(self, step: int, saved: LogContent | None) -> None:
        is_unchanged = saved is not None and content_of(self._descriptor, saved.size_bytes) == saved
        kept = LogContent(**saved.record()) if saved is not None and is_unchanged else LogContent()
        first_dropped: int | None = None
        is_scattered, num_damaged, position = False, 0, kept.size_bytes
        for line in read_lines(self.path, position):
            if is_kept(line, step):
                is_scattered |= first_dropped is not None
                kept.add(line)
            else:
                first_dropped = position if first_dropped is None else first_dropped
                num_damaged += line.endswith(b"\n") and parse_record(line) is None
            position += len(line)
        if first_dropped is not None:
            self._drop(step, first_dropped, is_scattered=is_scattered)
        self._cached = kept
        if saved is not None and kept.lines < saved.lines:
            self._warn(
                f"{self.path}: {saved.lines - kept.lines} of the {saved.lines} lines that it had when step {step} was "
                "saved are damaged or lost; the run continues without them"
            )
        elif num_damaged and not is_unchanged:
            damaged = "1 line is not a record" if num_damaged == 1 else f"{num_damaged} lines are not records"
            self._warn(f"{self.path}: {damaged}; the run continues without {'it' if num_damaged == 1 else 'them'}")
        elif saved is not None and not is_unchanged:
            self._warn(
                f"{self.path}: its first {saved.size_bytes} bytes have changed since step {step} was saved: "
                "lines were changed, repeated or moved; the run continues with them"
            )

    def _drop(self, step: int, first_dropped: int, *, is_scattered: bool) -> None:
        """Remove the lines that are not kept, from byte `first_dropped` on."""
        if not is_scattered:
            os.ftruncate(self._descriptor, first_dropped)
            return

        def write(target: int) -> None:
            copy_content(self._descriptor, LogContent(size_bytes=first_dropped), target)
            for line in read_lines(self.path, first_dropped):
                if is_kept(line, step):
                    write_whole(target, line)

        self._replace(write)

    def _replace(self, write: Callable[[int], None]) -> None:
        temporary = self.path.with_name(self.path.name + ".tmp")
        temporary.unlink(missing_ok=True)
        with temporary.open("xb") as file:
            write(file.fileno())
            os.fsync(file.fileno())
        temporary.replace(self.path)
        os.close(self._descriptor)
        self._descriptor = _open(self.path)

    def _attempt(self, act: Callable[[], object]) -> None:
        try:
            act()
        except OSError as error:
            reason = error.strerror or str(error)
            self._warn_once("cannot write metrics", f": {reason}; training continues, records are lost until it can")

    def _warn_once(self, what: str, more: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            self._warn(f"{self.path}: {what}{more}")


def read_jsonl(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return the records of a file written by `JsonlSink`, also while it is being written.

    Raises:
        DataError: if a line is not a JSON object. A last line without newline is still being written and left out.
        OSError: if the file cannot be read.
    """
    records = []
    for index, line in enumerate(read_lines(Path(path))):
        if not line.endswith(b"\n"):
            break
        record = parse_record(line)
        if record is None:
            raise DataError(f"{path}:{index + 1}: is not a JSON object; remove the line, or the file if it is not ours")
        records.append(record)
    return records


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
    return open_unshared(path, os.O_RDWR | os.O_APPEND | os.O_CREAT)


def _cut_half_line(descriptor: int) -> None:
    # A killed process may leave a partial line; appending to it would damage the next record too.
    size_bytes = end = os.fstat(descriptor).st_size
    while end > 0:
        start = max(0, end - _BLOCK_BYTES)
        found = os.pread(descriptor, end - start, start).rfind(b"\n")
        if found >= 0:
            end = start + found + 1
            break
        end = start
    if end < size_bytes:
        os.ftruncate(descriptor, end)
