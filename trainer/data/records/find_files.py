"""Expansion of paths, globs and folders into files; errors suggest what to write instead."""

import glob
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.data.records.text_files import is_compressed, readable
from trainer.errors import DataError, MissingFile

_BRACES = re.compile(r"\{([^{}]*,[^{}]*)\}")


@dataclass(frozen=True, slots=True, kw_only=True)
class FileKind:
    """A kind of file that a source reads."""

    kind: str  # `kind` of the source in the config
    suffixes: tuple[str, ...]  # suffixes of the files that are read from a folder, perhaps followed by .gz or .zst
    format: str  # name of the format for `kind: hf`, which also reads addresses

    def matches(self, path: Path) -> bool:
        """Return whether a file in a folder is of this kind."""
        return _suffix(path) in self.suffixes


TEXT = FileKind(kind="text", suffixes=(".txt", ".text", ".md", ".rst"), format="text")
JSON_LINES = FileKind(kind="jsonl", suffixes=(".jsonl", ".ndjson"), format="json")
_SUFFIXES = {"json": (".json", ".jsonl", ".ndjson"), "text": (".txt",)}
FORMATS = {
    name: FileKind(kind="hf", suffixes=_SUFFIXES.get(name, (f".{name}",)), format=name)
    for name in ("parquet", "arrow", "csv", "json", "text")
}
"""File formats that `kind: hf` accepts as `path`, with `data_files`."""


def find_files(patterns: str | Sequence[str], kind: FileKind) -> list[Path]:
    """Expand paths, globs and folders in order; the matches of each are sorted, and each file is listed once.

    In a glob, `**` stands for any number of folders and {a,b} for either; folders it matches are ignored. A folder
    stands for all files of the kind in it and in the folders below, without hidden files and linked folders. Raises
    DataError if a path is missing or an address, a glob matches no file, or a folder has none of the kind.
    """
    found: dict[Path, None] = {}  # an ordered set
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        with readable(Path(pattern)):
            found.update(dict.fromkeys(_match(pattern, kind)))
    for name in map(str, found):
        if name.encode(errors="ignore").decode() != name:
            raise DataError(f"{name!a}: its name is not UTF-8, which the cache manifest needs; rename it")
    return list(found)


def describe_folders(patterns: str | Sequence[str], kind: FileKind) -> list[str]:
    """Return a line for each pattern that is a folder: which of its files are read and which are left out."""
    lines = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        with readable(Path(pattern)):
            if not Path(pattern).is_dir():
                continue
            inside = list(_files_below(pattern))
            taken = [path for path in inside if kind.matches(path)]
            others = [path for path in inside if not kind.matches(path)]
        rest = f"; left out: {_count_suffixes(others)}" if others else ""
        lines.append(f"{pattern}: is a folder; read from it: {_count_suffixes(taken)}{rest}")
    return lines


def _match(pattern: str, kind: FileKind) -> list[Path]:
    path = Path(pattern)
    if path.is_file():  # first, so that a file called a[1].txt is found
        return [path]
    if "://" in pattern:
        raise DataError(
            f"{pattern}: is an address, and {kind.kind} reads local files; use kind: hf with path: "
            f"{kind.format} and data_files, or download it"
        )
    if path.is_dir():
        found = sorted((file for file in _files_below(pattern) if kind.matches(file)), key=str)
        if not found:
            raise _empty_folder(pattern, kind)
    else:
        found = sorted((match for one in _alternatives(pattern) for match in _matches(one)), key=str)
        if not found:
            message = f"{pattern}: the glob matches no file; globs are relative to {Path.cwd()}; correct the glob"
            raise MissingFile(message)
    for file in found:
        if not file.is_file():
            raise DataError(f"{file}: matched by {pattern}, but it is not a file (a broken link?); remove it")
    return found


def _matches(pattern: str) -> list[Path]:
    if not glob.has_magic(pattern):
        if not Path(pattern).exists():
            raise MissingFile(f"{pattern}: no such file; paths are relative to {Path.cwd()}; correct the path")
        return [Path(pattern)]
    # Path.glob refuses absolute patterns and, unlike a shell, matches hidden files.
    matches = [Path(match) for match in glob.glob(pattern, recursive=True)]  # noqa: PTH207
    return [match for match in matches if not match.is_dir()]


def _alternatives(pattern: str) -> list[str]:
    """Expand braces as a shell does."""
    if (braces := _BRACES.search(pattern)) is None:
        return [pattern]
    before, after = pattern[: braces.start()], pattern[braces.end() :]
    return [found for one in braces[1].split(",") for found in _alternatives(f"{before}{one}{after}")]


def _files_below(folder: str) -> Iterator[Path]:
    """Yield all files in a folder and the folders below, except hidden ones."""

    def refuse(error: OSError) -> None:
        raise error

    for place, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(place, name) for name in names if not name.startswith("."))


def _empty_folder(folder: str, kind: FileKind) -> MissingFile:
    files = list(_files_below(folder))
    fitting = [other for other in (TEXT, JSON_LINES, *FORMATS.values()) if any(other.matches(path) for path in files)]
    suffix = Counter(path.suffix for path in files).most_common(1)[0][0] if files else ""
    remedy = f"a glob such as {Path(folder) / '**' / f'*{suffix}'}"
    if fitting:
        options = f", path: {fitting[0].format}, data_files: {folder}" if fitting[0].kind == "hf" else ""
        remedy = f"kind: {fitting[0].kind}{options}"
    return MissingFile(
        f"{folder}: is a folder without a file that kind {kind.kind} reads ({', '.join(kind.suffixes)}); it has "
        f"{_count_suffixes(files) or 'no files'}; use {remedy}"
    )


def _suffix(path: Path) -> str:
    return (path.with_suffix("") if is_compressed(path) else path).suffix.lower()


def _count_suffixes(paths: Sequence[Path]) -> str:
    kinds = Counter(_suffix(path) or "without a suffix" for path in paths)
    return ", ".join(f"{number} {kind}" for kind, number in sorted(kinds.items()))
