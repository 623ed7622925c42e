"""Length and checksum of a log, kept in every checkpoint.

A resumed run need not parse the part of a log that existed at the checkpoint, and detects losses and changes in it.
"""

import os
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Self

_BLOCK_BYTES = 1 << 20
_MAX_INT = 1 << 53


@dataclass(slots=True, kw_only=True)
class LogContent:
    """Number, size and checksum of complete lines from the beginning of a log."""

    lines: int = 0
    size_bytes: int = 0
    crc32: int = 0
    """Detects accidental damage, not tampering."""

    def add(self, data: bytes) -> None:
        """Add complete lines."""
        self.lines += data.count(b"\n")
        self.size_bytes += len(data)
        self.crc32 = zlib.crc32(data, self.crc32)

    def record(self) -> dict[str, int]:
        """Return the content as JSON values."""
        return asdict(self)

    @classmethod
    def from_record(cls, value: object) -> Self | None:
        """Return the content that `record` described; None if the value is not valid."""
        if not isinstance(value, Mapping) or set(value) != {"lines", "size_bytes", "crc32"}:
            return None
        numbers = {str(key): number for key, number in value.items()}
        if not all(type(number) is int and 0 <= number <= _MAX_INT for number in numbers.values()):
            return None
        return cls(**numbers)


def content_of(descriptor: int, size_bytes: int) -> LogContent:
    """Return the content of the first `size_bytes` of an open file, or of all of a shorter one."""
    content = LogContent()
    for block in _blocks(descriptor, size_bytes):
        content.add(block)
    return content


def copy_content(descriptor: int, content: LogContent, target: int) -> None:
    """Append the first `content.size_bytes` of an open file to another one."""
    for block in _blocks(descriptor, content.size_bytes):
        write_whole(target, block)


def _blocks(descriptor: int, size_bytes: int) -> Iterator[bytes]:
    done = 0
    while done < size_bytes and (block := os.pread(descriptor, min(_BLOCK_BYTES, size_bytes - done), done)):
        yield block
        done += len(block)


def write_whole(descriptor: int, data: bytes) -> None:
    """Write all of `data`, in several calls if the system accepts less, as it may on a nearly full disk.

    Raises:
        OSError: if the disk fails; a part may have been written.
    """
    left = memoryview(data)
    while left:
        left = left[os.write(descriptor, left) :]
