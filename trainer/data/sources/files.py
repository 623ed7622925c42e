"""Finding and reading text files: every way a file can be wrong becomes one line that names it."""

import glob
import gzip
import io
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from trainer.errors import DataError

MAX_DOCUMENT_BYTES = 1 << 30
"""Largest document; one is held in memory while it becomes tokens."""

_CHUNK_BYTES = 1 << 20


def find_files(patterns: str | Sequence[str]) -> list[Path]:
    """Return the files that paths and globs name: patterns in order, the matches of a glob sorted, each file once.

    `**` in a glob stands for any number of folders; folders that a glob matches are passed over.

    Raises:
        DataError: if a path is missing or a folder, or a glob matches no file.
    """
    found: dict[Path, None] = {}  # an ordered set
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        with readable(Path(pattern)):
            found.update(dict.fromkeys(_match(pattern)))
    return list(found)


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file, plain or .gz. A byte order mark is left out; line ends stay as they are.

    Raises:
        DataError: if the file cannot be read, is too large, is not UTF-8 or holds no text.
    """
    content = bytearray()
    with readable(path), open_binary(path) as file:
        while chunk := file.read(_CHUNK_BYTES):
            content += chunk
            if len(content) > MAX_DOCUMENT_BYTES:
                raise DataError(
                    f"{path}: more than {MAX_DOCUMENT_BYTES} bytes in one document; that is the limit; split the file"
                )
    text = decode(content, path)
    if not text.strip():
        raise DataError(f"{path}: holds no text (empty or only white space); every file needs some; remove it")
    return text


def decode(content: bytes | bytearray, path: Path, *, first_byte: int = 0, first_line: int = 1) -> str:
    """Return `content`, which starts at this byte and line of the file, as text.

    Raises:
        DataError: naming line and byte, if it is not UTF-8.
    """
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = first_line + content.count(b"\n", 0, error.start)
        raise DataError(
            f"{path}:{line}: byte 0x{content[error.start]:02x} at offset {first_byte + error.start} is not UTF-8; "
            "text is read as UTF-8; convert the file (iconv -t UTF-8)"
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
    """Turn what the system says while a file is found or read into a DataError that names it."""
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: damaged gzip data ({error}); copy or compress the file again") from error
    except OSError as error:
        if error.errno is None and path.suffix == ".zst":
            raise DataError(f"{path}: damaged zstd data ({error}); copy or compress the file again") from error
        reason = error.strerror or str(error)
        raise DataError(f"{path}: cannot be read ({reason}); make it readable for this user") from error


def _match(pattern: str) -> list[Path]:
    path = Path(pattern)
    if path.is_file():  # first, so that a file called a[1].txt is found
        return [_named(path)]
    if path.is_dir():
        raise DataError(f"{pattern}: is a folder; a file or a glob is needed; use {path / '**' / '*.txt'}")
    if not glob.has_magic(pattern):
        raise DataError(f"{pattern}: no such file; paths are relative to {Path.cwd()}; correct the path")
    # Path.glob refuses absolute patterns and, unlike a shell, takes hidden files.
    matches = [Path(match) for match in sorted(glob.glob(pattern, recursive=True))]  # noqa: PTH207
    files = [match for match in matches if not match.is_dir()]
    if not files:
        raise DataError(f"{pattern}: the glob matches no file; globs are relative to {Path.cwd()}; correct the glob")
    for file in files:
        if not file.is_file():
            raise DataError(f"{file}: matched by {pattern}, but it is no file (a broken link?); remove it")
    return [_named(file) for file in files]


def _named(path: Path) -> Path:
    """Refuse a file that cannot be named in a manifest or a message."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{str(path)!a}: its name is not UTF-8; names are written down; rename it") from error
    return path
