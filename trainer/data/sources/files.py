"""Reading text files: every way a file can be wrong becomes one line that names it."""

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from trainer.data.records.bad_records import BadRow
from trainer.errors import DataError

MAX_DOCUMENT_BYTES = 1 << 30
"""Largest document; one is held in memory while it becomes tokens."""

NO_TEXT, TOO_LARGE = "without text", "too large"
"""Reasons why a document cannot be used."""

_CHUNK_BYTES = 1 << 20


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file, plain or .gz. A byte order mark is left out; line ends stay as they are.

    Raises:
        BadRow: if the file is too large, damaged, not UTF-8 or holds no text.
        DataError: if it cannot be read.
    """
    content = bytearray()
    with readable(path), open_binary(path) as file:
        while chunk := file.read(_CHUNK_BYTES):
            content += chunk
            if len(content) > MAX_DOCUMENT_BYTES:
                raise BadRow(
                    f"{path}: more than {MAX_DOCUMENT_BYTES} bytes in one document; that is the limit; split the file",
                    reason=TOO_LARGE,
                )
    text = decode(content, path)
    if not text.strip():
        raise BadRow(
            f"{path}: holds no text (empty or only white space); every file needs some; remove it",
            reason=NO_TEXT,
            file=path,
        )
    return text


def decode(content: bytes | bytearray, path: Path, *, first_byte: int = 0, first_line: int = 1) -> str:
    """Return `content`, which starts at this byte and line of the file, as text.

    Raises:
        BadRow: naming line and byte, if it is not UTF-8.
    """
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = first_line + content.count(b"\n", 0, error.start)
        raise BadRow(
            f"{path}:{line}: byte 0x{content[error.start]:02x} at offset {first_byte + error.start} is not UTF-8; "
            "text is read as UTF-8; convert the file (iconv -t UTF-8)",
            reason="not UTF-8",
        ) from error
    # The mark is an artefact of the editor, not text; only the very start of a file can have it.
    return text.removeprefix("\ufeff") if first_byte == 0 else text


def is_compressed(path: Path) -> bool:
    """Return whether a file can only be read from its beginning."""
    return path.suffix in (".gz", ".zst")


def open_binary(path: Path) -> BinaryIO:
    """Open a file for reading bytes; .gz and .zst are unpacked."""
    if path.suffix == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    if path.suffix == ".zst":
        import pyarrow  # which, unlike zstandard's own reader, notices a file that was cut off

        return cast(BinaryIO, io.BufferedReader(pyarrow.CompressedInputStream(str(path), "zstd")))
    return path.open("rb")


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn what the system says while a file is found or read into a DataError that names it; damage into a BadRow."""
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise _damaged(path, "gzip", error) from error
    except OSError as error:
        if error.errno is None and path.suffix == ".zst":
            raise _damaged(path, "zstd", error) from error
        reason = error.strerror or str(error)
        raise DataError(f"{path}: cannot be read ({reason}); make it readable for this user") from error


def _damaged(path: Path, format_: str, error: Exception) -> BadRow:
    message = f"{path}: damaged {format_} data ({error}); copy or compress the file again"
    return BadRow(message, reason=f"damaged {format_} data")
