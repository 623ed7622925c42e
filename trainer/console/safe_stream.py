"""An output stream that cannot stop a training run: what nobody can read any more is dropped."""

import errno
import io
import os
from typing import TextIO

# The reader is gone for good: a closed pipe, a hung-up terminal, a closed descriptor.
_GONE = frozenset({errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO})


class SafeStream:
    """Text stream around another that swallows its errors and replaces what its encoding cannot hold.

    A full disk loses what was written while it was full; a reader that went away silences the stream for good.
    """

    def __init__(self, stream: TextIO | None) -> None:
        # Python's own standard output is None in a process that was started without one.
        self._stream = stream or io.StringIO()
        self.silent = stream is None
        """Nobody reads this stream any more."""

    @property
    def encoding(self) -> str:
        """Encoding of the stream beneath; UTF-8 where it has none (it takes any character)."""
        return getattr(self._stream, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        """Return whether a person watches."""
        try:
            return self._stream.isatty()
        except (OSError, ValueError):
            return False

    def fileno(self) -> int:
        """Return the descriptor beneath, which raises OSError where there is none."""
        return self._stream.fileno()

    def write(self, text: str) -> int:
        """Write `text` if anyone can still read it."""
        if not self.silent:
            try:
                self._stream.write(text.encode(self.encoding, "replace").decode(self.encoding))
            except (OSError, ValueError) as error:
                self._lost(error)
        return len(text)

    def flush(self) -> None:
        """Flush what was written if anyone can still read it."""
        if not self.silent:
            try:
                self._stream.flush()
            except (OSError, ValueError) as error:
                self._lost(error)

    def _lost(self, error: OSError | ValueError) -> None:
        # ValueError is Python's "I/O operation on closed file".
        if isinstance(error, OSError) and error.errno not in _GONE:
            return
        self.silent = True
        try:
            descriptor = self._stream.fileno()
        except (OSError, ValueError):
            return
        # Python flushes its standard streams once more on exit and would turn the broken pipe into exit code 120.
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, descriptor)
        os.close(null)
