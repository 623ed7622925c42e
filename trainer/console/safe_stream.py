"""An output stream that cannot stop a training run: when its reader is gone, output is dropped."""

import errno
import io
import os
from collections.abc import Callable
from typing import Final, TextIO

_GONE: Final = frozenset({errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO})
"""Errors after which nobody reads again: a closed pipe, a hung-up terminal, a closed descriptor."""


class SafeStream:
    """Text stream that swallows the errors of the one it wraps and replaces characters its encoding lacks.

    A full disk loses what is written while it is full; a reader that went away silences the stream for good.
    """

    def __init__(self, stream: TextIO | None) -> None:
        # Python's own standard output is None in a process that was started without one.
        self._stream = stream or io.StringIO()
        self._is_silent = stream is None  # true once output is dropped for good

    @property
    def encoding(self) -> str:
        """Encoding of the wrapped stream; UTF-8 if it has none."""
        return getattr(self._stream, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        """Return whether the stream is a terminal."""
        try:
            return self._stream.isatty()
        except (OSError, ValueError):
            return False

    def fileno(self) -> int:
        """Return the descriptor of the wrapped stream; raise OSError if it has none."""
        return self._stream.fileno()

    def write(self, text: str) -> int:
        """Write `text`, or drop it if the stream is broken."""
        self._attempt(lambda: self._stream.write(text.encode(self.encoding, "replace").decode(self.encoding)))
        return len(text)

    def flush(self) -> None:
        """Flush the wrapped stream unless it is broken."""
        self._attempt(self._stream.flush)

    def _attempt(self, act: Callable[[], object]) -> None:
        if self._is_silent:
            return
        try:
            act()
            return
        except (OSError, ValueError) as error:  # ValueError is Python's "I/O operation on closed file"
            if isinstance(error, OSError) and error.errno not in _GONE:
                return
        self._is_silent = True
        try:
            descriptor = self._stream.fileno()
        except (OSError, ValueError):
            return
        # Python flushes its standard streams once more on exit and would turn the broken pipe into exit code 120.
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, descriptor)
        os.close(null)
