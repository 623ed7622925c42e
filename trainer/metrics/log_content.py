"""Content of a log: lines, size and checksum of its bytes, which every checkpoint keeps of its run's logs.

So a run that goes on need not parse what was there when its checkpoint was saved, and knows what has been lost of it.
"""

import os
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Self

_BLOCK_BYTES = 1 << 20
_MOST = 1 << 53


@dataclass(slots=True, kw_only=True)
class LogContent:
    """Whole lines from the beginning of a log."""

    lines: int = 0
    size_bytes: int = 0
    crc32: int = 0
    """Tells damage, and no intent."""

    def add(self, data: bytes) -> None:
        """Append whole lines."""
        self.lines += data.count(b"\n")
        self.size_bytes += len(data)
        self.crc32 = zlib.crc32(data, self.crc32)

    def record(self) -> dict[str, int]:
        """Return JSON values."""
        return asdict(self)

    @classmethod
    def recorded(cls, value: object) -> Self | None:
        """Return what `record` gave; None if it is something else, or damaged."""
        if not isinstance(value, Mapping) or set(value) != {"lines", "size_bytes", "crc32"}:
            return None
        numbers = {str(key): number for key, number in value.items()}
        if not all(type(number) is int and 0 <= number <= _MOST for number in numbers.values()):
            return None
        return cls(**numbers)


def content_of(descriptor: int, size_bytes: int) -> LogContent:
    """Read so much of an open file from its beginning, a block at a time; of a shorter one all there is.

    Raises:
        OSError: if it cannot be read.
    """
    content = LogContent()
    while content.size_bytes < size_bytes:
        block = os.pread(descriptor, min(_BLOCK_BYTES, size_bytes - content.size_bytes), content.size_bytes)
        if not block:
            break
        content.add(block)
    return content


def copy_content(descriptor: int, content: LogContent, target: int) -> None:
    """Copy as many bytes of an open file to the end of another one.

    Raises:
        OSError: if the disk refuses.
    """
    done = 0
    while done < content.size_bytes and (
        block := os.pread(descriptor, min(_BLOCK_BYTES, content.size_bytes - done), done)
    ):
        write_whole(target, block)
        done += len(block)


def write_whole(descriptor: int, data: bytes) -> None:
    """Write all of it, in one call unless the system takes less: it may, where a disk is nearly full.

    Raises:
        OSError: if the disk refuses; a part may be written.
    """
    left = memoryview(data)
    while left:
        left = left[os.write(descriptor, left) :]
