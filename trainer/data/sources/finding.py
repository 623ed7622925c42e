"""Finding the files that paths, globs and folders name; where there are none, one line says what to write instead."""

import glob
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.data.sources.files import is_compressed, readable
from trainer.errors import DataError, MissingFile

_BRACES = re.compile(r"\{([^{}]*,[^{}]*)\}")


@dataclass(frozen=True, slots=True, kw_only=True)
class FileKind:
    """Kind of files that a source reads."""

    kind: str
    """Kind of the source."""
    suffixes: tuple[str, ...]
    """Suffixes of the files that are taken from a folder, perhaps followed by .gz or .zst."""
    format: str
    """Name of the format in `hf`, which reads addresses."""

    def takes(self, path: Path) -> bool:
        """Return whether a file in a folder is one."""
        return _suffix(path) in self.suffixes

    def named(self, folder: str) -> str:
        """Return how a config asks for the files of a folder."""
        return f"kind: {self.kind}" if self.kind != "hf" else f"kind: hf, path: {self.format}, data_files: {folder}"


TEXT = FileKind(kind="text", suffixes=(".txt", ".text", ".md", ".rst"), format="text")
JSON_LINES = FileKind(kind="jsonl", suffixes=(".jsonl", ".ndjson"), format="json")
OF_FORMAT = {
    "parquet": FileKind(kind="hf", suffixes=(".parquet",), format="parquet"),
    "arrow": FileKind(kind="hf", suffixes=(".arrow",), format="arrow"),
    "csv": FileKind(kind="hf", suffixes=(".csv",), format="csv"),
    "json": FileKind(kind="hf", suffixes=(".json", ".jsonl", ".ndjson"), format="json"),
    "text": FileKind(kind="hf", suffixes=(".txt",), format="text"),
}


def find_files(patterns: str | Sequence[str], kind: FileKind) -> list[Path]:
    """Return the files that paths, globs and folders name: in this order, the matches of each sorted, each file once.

    `**` in a glob stands for any number of folders, {a,b} for either; folders that a glob matches are passed over. Of a
    folder all files of the kind are taken, in all folders below; hidden ones are not, nor folders that are links.

    Raises:
        DataError: if a path is missing or an address, a glob matches no file, or a folder has none of the kind.
    """
    found: dict[Path, None] = {}  # an ordered set
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        with readable(Path(pattern)):
            found.update(dict.fromkeys(_match(pattern, kind)))
    return list(found)


def taken_from_folders(patterns: str | Sequence[str], kind: FileKind) -> list[str]:
    """Return a line for each of the patterns that is a folder: what is taken from it, and what is not.

    Raises:
        DataError: if a folder cannot be read.
    """
    lines = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        with readable(Path(pattern)):
            if not Path(pattern).is_dir():
                continue
            inside = list(_inside(pattern))
            taken = [path for path in inside if kind.takes(path)]
            others = [path for path in inside if not kind.takes(path)]
        rest = f"; left out: {_counted(others)}" if others else ""
        lines.append(f"{pattern}: is a folder; read from it: {_counted(taken)}{rest}")
    return lines


def _match(pattern: str, kind: FileKind) -> list[Path]:
    path = Path(pattern)
    if path.is_file():  # first, so that a file called a[1].txt is found
        return [_named(path)]
    if "://" in pattern:
        raise DataError(
            f"{pattern}: is an address, and {kind.kind} reads files of this machine; use kind: hf with path: "
            f"{kind.format} and data_files, or download it"
        )
    if path.is_dir():
        found = sorted((file for file in _inside(pattern) if kind.takes(file)), key=str)
        if not found:
            raise _nothing_inside(pattern, kind)
    else:
        found = sorted((match for one in _alternatives(pattern) for match in _matches(one)), key=str)
        if not found:
            raise MissingFile(
                f"{pattern}: the glob matches no file; globs are relative to {Path.cwd()}; correct the glob"
            )
    for file in found:
        if not file.is_file():
            raise DataError(f"{file}: matched by {pattern}, but it is no file (a broken link?); remove it")
    return [_named(file) for file in found]


def _matches(pattern: str) -> list[Path]:
    """Return what one path or glob names, without folders."""
    if not glob.has_magic(pattern):
        if not Path(pattern).exists():
            raise MissingFile(f"{pattern}: no such file; paths are relative to {Path.cwd()}; correct the path")
        return [Path(pattern)]
    # Path.glob refuses absolute patterns and, unlike a shell, takes hidden files.
    matches = [Path(match) for match in glob.glob(pattern, recursive=True)]  # noqa: PTH207
    return [match for match in matches if not match.is_dir()]


def _alternatives(pattern: str) -> list[str]:
    """Return the patterns that one with braces stands for, as a shell does."""
    braces = _BRACES.search(pattern)
    if braces is None:
        return [pattern]
    before, behind = pattern[: braces.start()], pattern[braces.end() :]
    return [found for one in braces[1].split(",") for found in _alternatives(f"{before}{one}{behind}")]


def _inside(folder: str) -> Iterator[Path]:
    """Yield all files in a folder and in the folders below, but for hidden ones."""
    for place, folders, names in os.walk(folder, onerror=_refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(place, name) for name in names if not name.startswith("."))


def _refuse(error: OSError) -> None:
    raise error


def _nothing_inside(folder: str, kind: FileKind) -> MissingFile:
    files = list(_inside(folder))
    fitting = [other for other in (TEXT, JSON_LINES, *OF_FORMAT.values()) if any(other.takes(path) for path in files)]
    suffix = Counter(path.suffix for path in files).most_common(1)[0][0] if files else ""
    remedy = fitting[0].named(folder) if fitting else f"a glob such as {Path(folder) / '**' / f'*{suffix}'}"
    return MissingFile(
        f"{folder}: is a folder without a file that {kind.kind} takes from one ({', '.join(kind.suffixes)}); it has "
        f"{_counted(files) or 'no files'}; use {remedy}"
    )


def _suffix(path: Path) -> str:
    """Return what kind of file a name says it is, compressed or not."""
    return (path.with_suffix("") if is_compressed(path) else path).suffix.lower()


def _counted(paths: Sequence[Path]) -> str:
    kinds = Counter(_suffix(path) or "without a suffix" for path in paths)
    return ", ".join(f"{number} {kind}" for kind, number in sorted(kinds.items()))


def _named(path: Path) -> Path:
    """Refuse a file that cannot be named in a manifest or a message."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{str(path)!a}: its name is not UTF-8; names are written down; rename it") from error
    return path
