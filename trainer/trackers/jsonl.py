"""Metrics on disk: one JSON object a line, valid to its last line whatever happens to the run."""

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
from trainer.metrics.records import is_kept, lines, parse

_BLOCK_BYTES = 1 << 20


class JsonlSink:
    """Appends records to a file, a line each, so that a reader sees every record as soon as it is written.

    Values may be None, bool, numbers, strings, lists and mappings of them, and numpy scalars and arrays. A number that
    is not finite is written as null, because JSON has none. When a write fails (a full disk), the sink warns once,
    leaves no part of the record behind, and tries again with the next one. A file that somebody removes, replaces or
    cuts meanwhile is noticed before the next record: what was removed is written again, what is lost is counted.

    Args:
        path: The file; its folder is made if it is not there.
        warn: What is called with each warning.

    Raises:
        DataError: if something else has its name, such as a link or a pipe.
        OSError: if the file cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str], *, warn: Callable[[str], None] | None = None) -> None:
        self.path = Path(path)
        self._warn = warn or _warn
        self._warned: set[str] = set()
        self._known: LogContent | None = None
        self._is_torn = False
        """A part of a record is at the end, and could not be taken away yet."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._descriptor = _open(self.path)
        except NotRegular:
            raise DataError(f"{self.path}: is no regular file; remove it, it is not ours") from None
        self._is_watched = is_open_file(self.path, self._descriptor)  # where a file system can tell
        _cut_half_line(self._descriptor)

    def write(self, record: Mapping[str, object]) -> None:
        """Append `record`; it is in the hands of the operating system on return."""
        line = (json.dumps(_plain(record), allow_nan=False) + "\n").encode()
        self._attempt(self._look)
        if not self._is_torn:
            self._attempt(lambda: self._append(line))

    def content(self) -> LogContent:
        """Return what the file holds, after a look whether it is what was written: what a checkpoint remembers."""
        self._attempt(self._look)
        return self._content

    def resume_at(self, step: int, known: LogContent | None = None) -> None:
        """Forget what a run that resumes from completed step `step` will log again.

        Every record whose `step` is greater goes, and so does a line that is not a record. The file is cut, or replaced
        in one move: a crash leaves the old one or the new one. It is read a line at a time, and what is as it was when
        the checkpoint was saved is not parsed.

        Args:
            step: Completed steps.
            known: What the file held when the checkpoint was saved; what is lost of it is told.
        """
        self._attempt(lambda: self._resume_at(step, known))

    def close(self) -> None:
        """Close the file; closing twice does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    @property
    def _content(self) -> LogContent:
        """Content that was written or found, as long as nobody else touches the file."""
        if self._known is None:
            self._known = content_of(self._descriptor, os.fstat(self._descriptor).st_size)
        return self._known

    def _append(self, line: bytes) -> None:
        try:
            write_whole(self._descriptor, line)
        except OSError:
            self._is_torn = True
            self._mend()
            raise
        self._content.add(line)

    def _mend(self) -> None:
        """Take away the part of a record that was written before the disk refused; else the next one would spoil it."""
        if self._is_torn:
            os.ftruncate(self._descriptor, self._content.size_bytes)
            self._is_torn = False

    def _look(self) -> None:
        """See whether the file is still the one that is written, and holds what it should."""
        self._mend()
        if self._is_watched and not is_open_file(self.path, self._descriptor):
            if os.path.lexists(self.path):
                self._go_over()
            else:
                self._restore()
        elif os.fstat(self._descriptor).st_size != self._content.size_bytes:
            self._count_again()

    def _restore(self) -> None:
        """Write a file that was removed again: this process still has it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._replace(lambda target: copy_content(self._descriptor, self._content, target))
        self._warn(f"{self.path}: was removed while the run writes it; its {self._content.lines} lines are restored")

    def _go_over(self) -> None:
        """Go on in a file that somebody has put in the place of this one."""
        descriptor = _open(self.path)
        had = self._content.lines
        os.close(self._descriptor)
        self._descriptor, self._known = descriptor, None
        _cut_half_line(descriptor)
        has = f"it has {self._content.lines} lines, and had {had}"
        self._warn(f"{self.path}: was replaced by another file while the run writes it; {has}")

    def _count_again(self) -> None:
        """Take a file for what somebody else has made of it."""
        had, self._known = self._content.lines, None
        _cut_half_line(self._descriptor)
        now = self._content.lines
        if now < had:
            self._warn(f"{self.path}: was cut while the run writes it; {had - now} of {had} lines are lost")
        else:
            self._warn_once("something else writes into it", f"; {now - had} lines are not the run's")

    def _resume_at(self, step: int, known: LogContent | None) -> None:
        is_whole = known is not None and content_of(self._descriptor, known.size_bytes) == known
        kept = LogContent(**known.record()) if known is not None and is_whole else LogContent()
        first_dropped: int | None = None
        is_scattered, num_damaged, position = False, 0, kept.size_bytes
        for line in lines(self.path, position):
            if is_kept(line, step):
                is_scattered |= first_dropped is not None
                kept.add(line)
            else:
                first_dropped = position if first_dropped is None else first_dropped
                num_damaged += line.endswith(b"\n") and parse(line) is None
            position += len(line)
        if first_dropped is not None:
            self._drop(step, first_dropped, is_scattered=is_scattered)
        self._known = kept
        if known is not None and kept.lines < known.lines:
            self._warn(
                f"{self.path}: {known.lines - kept.lines} of the {known.lines} lines that it had when step {step} was "
                "saved are damaged or gone; the run goes on without them"
            )
        elif num_damaged and not is_whole:
            damaged = "1 line is no record" if num_damaged == 1 else f"{num_damaged} lines are no records"
            self._warn(f"{self.path}: {damaged}; the run goes on without {'it' if num_damaged == 1 else 'them'}")
        elif known is not None and not is_whole:
            self._warn(
                f"{self.path}: its first {known.size_bytes} bytes are not what they were when step {step} was saved: "
                "lines were changed, repeated or moved; the run goes on with them"
            )

    def _drop(self, step: int, first_dropped: int, *, is_scattered: bool) -> None:
        """Take away the lines that are not kept, from the first of them on."""
        if not is_scattered:
            os.ftruncate(self._descriptor, first_dropped)
            return

        def write(target: int) -> None:
            copy_content(self._descriptor, LogContent(size_bytes=first_dropped), target)
            for line in lines(self.path, first_dropped):
                if is_kept(line, step):
                    write_whole(target, line)

        self._replace(write)

    def _replace(self, write: Callable[[int], None]) -> None:
        """Put another file in the place of this one, in one move."""
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
            self._warn_once("cannot write metrics", f": {reason}; training goes on, records are lost until it can")

    def _warn_once(self, what: str, more: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            self._warn(f"{self.path}: {what}{more}")


def read_jsonl(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return the records of a file written by `JsonlSink`, also while it is being written.

    Raises:
        DataError: if a line is not a JSON object. A last line without its newline is still being written and left out.
        OSError: if the file cannot be read.
    """
    records = []
    for index, line in enumerate(lines(Path(path))):
        if not line.endswith(b"\n"):
            break
        record = parse(line)
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
    # The rest of a line that a killed process began; appending to it would spoil the next record as well.
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


def _warn(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=2)
