"""Reading text files; every failure becomes a one-line error that names the file."""

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from trainer.data.records.bad_records import BadRecord
from trainer.errors import DataError

MAX_DOCUMENT_BYTES = 1 << 30  # largest document: each is held in memory while it is tokenised

NO_TEXT, TOO_LARGE = "without text", "too large"  # values of `BadRecord.reason`

_CHUNK_BYTES = 1 << 20


def read_document(path: Path) -> str:
    """Return the text of a UTF-8 file, plain, .gz or .zst, without a byte order mark; line ends are unchanged.

    Raises BadRecord if the file is too large, damaged, not UTF-8 or holds no text, and DataError if it cannot be read.
    """
    content = bytearray()
    with readable(path), open_binary(path) as file:
        while chunk := file.read(_CHUNK_BYTES):
            content += chunk
            if len(content) > MAX_DOCUMENT_BYTES:
                raise BadRecord(
                    f"{path}: more than {MAX_DOCUMENT_BYTES} bytes in one document; that is the limit; split the file",
                    reason=TOO_LARGE,
                )
    text = decode(content, path)
    if not text.strip():
        message = f"{path}: holds no text (empty or only white space); every file needs some; remove it"
        raise BadRecord(message, reason=NO_TEXT, file=path)
    return text


def decode(content: bytes | bytearray, path: Path, *, first_byte: int = 0, first_line: int = 1) -> str:
    """Decode `content`, which starts at this byte and line of the file; raise BadRecord if it is not UTF-8."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = first_line + content.count(b"\n", 0, error.start)
        raise BadRecord(
            f"{path}:{line}: byte 0x{content[error.start]:02x} at offset {first_byte + error.start} is not UTF-8; "
            "text is read as UTF-8; convert the file (iconv -t UTF-8)",
            reason="not UTF-8",
        ) from error
    # A byte order mark is an artefact of the editor, not text; it can only stand at the start of a file.
    return text.removeprefix("\ufeff") if first_byte == 0 else text


def is_compressed(path: Path) -> bool:
    """Return whether a file is compressed, and so can only be read from its beginning."""
    return path.suffix in (".gz", ".zst")


def open_binary(path: Path) -> BinaryIO:
    """Open a file for reading bytes; .gz and .zst are decompressed."""
    if path.suffix == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    if path.suffix == ".zst":
        import pyarrow  # unlike the reader of zstandard, it notices a truncated file

        return cast(BinaryIO, io.BufferedReader(pyarrow.CompressedInputStream(str(path), "zstd")))
    return path.open("rb")


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn an OSError about a file into a DataError that names it, and damaged compression into a BadRecord."""
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise _damaged(path, "gzip", error) from error
    except OSError as error:
        if error.errno is None and path.suffix == ".zst":
            raise _damaged(path, "zstd", error) from error
        reason = error.strerror or str(error)
        raise DataError(f"{path}: cannot be read ({reason}); make it readable for this user") from error


def _damaged(path: Path, format_: str, error: Exception) -> BadRecord:
    message = f"{path}: damaged {format_} data ({error}); copy or compress the file again"
    return BadRecord(message, reason=f"damaged {format_} data")
