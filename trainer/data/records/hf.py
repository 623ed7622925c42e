"""Data sets that Hugging Face `datasets` reads, streamed: nothing is copied before it is read.

JSON Lines on this machine are read by our own reader: theirs makes a string of a number, and null of a key that is
missing, once it has seen the first 10 MB.
"""

import logging
import os
import socket
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from trainer.data.records import jsonl
from trainer.data.records.bad_records import BadRow
from trainer.data.records.base import Row, Rows, SourcePart
from trainer.data.records.jsonl import JsonlRows, Lines, no_rows
from trainer.data.records.memory_limit import bounded
from trainer.data.records.registry import FORMATS, DatasetConfig
from trainer.data.records.tables import (
    TOO_MANY_FIELDS,
    has_too_many_fields,
    lines_left_out,
    one_line,
    row_of,
    values_in,
)
from trainer.data.sources.files import open_binary, readable
from trainer.data.sources.finding import OF_FORMAT, find_files, taken_from_folders
from trainer.errors import DataError

_BATCH_ROWS = 100
"""In memory at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard(SourcePart):
    """One of a data set's shards, which are its files where they are local."""

    index: int
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EmptyFile(SourcePart):
    """A file of no bytes, which no library takes for one of its format."""

    name: str


class HfRows(Rows):
    """A split of a data set."""

    def __init__(self, config: DatasetConfig, *, columns: Iterable[str] = (), skips_bad_rows: bool = False) -> None:
        """Take the options.

        Args:
            config: which data set.
            columns: the only ones that are wanted; none: all.
            skips_bad_rows: whether lines of a csv with too many fields are bad rows, and not an error of the file.
        """
        self._config = config
        self._columns = sorted(set(columns))
        self._skips_bad_rows = skips_bad_rows

    def files(self) -> list[Path]:
        """Return the local files.

        Raises:
            DataError: if the data set or its split cannot be found.
        """
        return [Path(name) for name in self._names if "://" not in name]

    def origin(self) -> str:
        """Return the addresses of the files that are not local, with their commit or what else tells their version.

        Raises:
            DataError: if the data set or its split cannot be found.
        """
        remote = [name for name in self._names if "://" in name]
        if all(name.startswith("hf://") for name in remote):
            return "\n".join(remote)
        of_split = self._loaded[0].config.data_files[self._config.split]
        versions = getattr(of_split, "origin_metadata", [])  # of a web server, the ETag
        return "\n".join([*remote, *("/".join(version) for version in versions)])

    def parts(self) -> Sequence[SourcePart]:
        """Return the shards.

        Raises:
            DataError: if the data set or its split cannot be found or opened.
        """
        if self._is_local_json:
            return self._lines.parts()
        empty = [EmptyFile(name=name, size_bytes=0) for name in self._names if _is_empty(name)]
        names = [name for name in self._names if not _is_empty(name)]
        if empty and not names:
            return empty
        with self._explained():
            num_shards = self._stream.num_shards
        names = names if len(names) == num_shards else [f"{self} shard {i}" for i in range(num_shards)]
        sizes = [Path(name).stat().st_size if Path(name).is_file() else 0 for name in names]
        shards = [
            Shard(index=i, name=name, size_bytes=size) for i, (name, size) in enumerate(zip(names, sizes, strict=True))
        ]
        return [*empty, *shards]

    def entries(self, part: SourcePart) -> Iterator[Row | BadRow]:
        """Yield the rows of a shard, those that cannot be read as what is wrong with them.

        Raises:
            DataError: naming the file and about the row, if the library cannot go on.
        """
        if isinstance(part, Lines):
            yield from self._lines.entries(part)
        elif isinstance(part, EmptyFile):
            yield no_rows(part.name)
        else:
            assert isinstance(part, Shard), "parts() gave it"
            yield from self._rows_of(part)

    def _rows_of(self, part: Shard) -> Iterator[Row | BadRow]:
        number = 0
        with self._explained():
            shard = self._stream.shard(self._stream.num_shards, part.index)
            tables = shard.with_format("arrow").iter(batch_size=_BATCH_ROWS)
        while True:
            where = f"{part.name}: row {number + 1} or one of the next {_BATCH_ROWS}"
            try:
                with self._explained(where), lines_left_out(part.name) as left_out:
                    table = next(tables, None)
                    rows = [] if table is None else values_in(table)
            except BadRow as bad:  # the library ends there; it goes on only where such lines are to be skipped
                yield bad
                return
            yield from left_out
            if table is None:
                break
            for values in rows:
                number += 1
                yield row_of(values, f"{part.name}: row {number}")
        if number == 0:
            yield no_rows(part.name)

    def __str__(self) -> str:
        return ":".join(part for part in (self._config.path, self._config.name, self._config.split) if part)

    @cached_property
    def _patterns(self) -> list[str]:
        """Patterns in `data_files`."""
        data_files = self._config.data_files or []
        return [data_files] if isinstance(data_files, str) else data_files

    def _found(self) -> list[str]:
        """Return what `data_files` names, as the library takes it: it knows no braces, and no folder.

        Raises:
            DataError: if local files of a format are not there, which the library says less clearly.
        """
        if self._config.path not in FORMATS:
            return self._patterns
        found: list[str] = []
        for pattern in self._patterns:
            files = [] if "://" in pattern else find_files(pattern, OF_FORMAT[self._config.path])
            is_ours = "{" in pattern or Path(pattern).is_dir()
            found += [str(path) for path in files] if files and is_ours else [pattern]
        return found

    def taken(self) -> list[str]:
        """Return a line for each folder that files are taken from."""
        if self._config.path not in FORMATS:
            return []
        return taken_from_folders(self._patterns, OF_FORMAT[self._config.path])

    @cached_property
    def _loaded(self) -> tuple[Any, dict[str, list[str]]]:
        """Load the library's builder for the files that are not empty, and list all files of each split."""
        datasets = _library()
        config = self._config
        options = {"keep_default_na": False} if config.path == "csv" else {}  # `NA` is a text like any other
        with self._explained():
            builder = datasets.load_dataset_builder(
                config.path,
                name=config.name,
                revision=config.revision,
                data_files=None if not self._patterns else {config.split: _pinned(self._found())},
                data_dir=config.data_dir,
                **options,
            )
        self._check_inside(builder)
        if builder.name == "parquet":  # by default it reads a whole row group at a time
            builder.config.batch_size = _BATCH_ROWS
        if builder.name == "csv" and self._skips_bad_rows:
            builder.config.on_bad_lines = "warn"
        files = builder.config.data_files or {}
        named = {str(split): [str(name) for name in names] for split, names in files.items()}
        for names in files.values():
            names[:] = [name for name in names if not _is_empty(str(name))]
        return builder, named

    def _check_inside(self, builder: Any) -> None:
        """Refuse files outside of a local data set, which its README.md may name; of the hub the library does.

        Raises:
            DataError: if there is one.
        """
        config = self._config
        if config.data_files is not None or not Path(config.path).is_dir():
            return
        roots = [os.path.realpath(root) for root in (config.path, Path(config.path, config.data_dir or "."))]
        for name in (str(name) for names in (builder.config.data_files or {}).values() for name in names):
            path = Path(os.path.normpath(name))
            if "://" in name or "::" in name or not any(path.is_relative_to(root) for root in roots):
                raise DataError(
                    f"{self}: its README.md names {name}, which is not in {config.path}; a data set reads files of its "
                    "own; correct README.md, or name files by data_files"
                )

    @cached_property
    def _stream(self) -> Any:
        """The rows of all files that are not empty."""
        with self._explained():
            stream = self._loaded[0].as_streaming_dataset(split=self._config.split)
            if self._columns and stream.features is not None:
                # A column that is not there is reported with the first row, beside those that are.
                wanted = {column if column in stream.features else column.split(".")[0] for column in self._columns}
                if wanted <= set(stream.features):
                    stream = stream.select_columns(sorted(wanted))
            return stream

    @cached_property
    def _names(self) -> list[str]:
        """Paths and addresses of the split's files; none for a data set that a script makes."""
        named = self._loaded[1]
        if named and self._config.split not in named:
            known = ", ".join(named)
            raise DataError(f"{self}: no split {self._config.split!r}; the data set has {known}; correct `split`")
        return named.get(self._config.split, [])

    @cached_property
    def _is_local_json(self) -> bool:
        """True for JSON Lines; a file may also be one list, which the library reads whole."""
        if self._loaded[0].name != "json" or not self._names or self.origin():
            return False
        return all(not _starts_a_list(path) for path in self.files())

    @cached_property
    def _lines(self) -> JsonlRows:
        return JsonlRows(self._names)

    @contextmanager
    def _explained(self, where: str = "") -> Iterator[None]:
        """Make one line of whatever the library raises, and let it take no more memory than some rows need."""
        try:
            with bounded(
                where or f"{self}",
                f"a row has at most {jsonl.MAX_ROW_BYTES} bytes: split those that have more, or the file",
            ):
                yield
        except DataError:
            raise
        except MemoryError:
            raise
        except Exception as error:  # of any library that reads a format
            reason = one_line(error) or type(error).__name__
            if _is_of_the_network(error):
                addresses = [pattern for pattern in self._patterns if "://" in pattern] or [str(self)]
                raise DataError(
                    f"{', '.join(addresses)}: cannot be reached ({reason}); the hub or its cache is needed; check the "
                    "network, or give local files"
                ) from error
            message = f"{where or self}: cannot be read ({reason}); correct the data or its options"
            if has_too_many_fields(reason):
                raise BadRow(message, reason=TOO_MANY_FIELDS) from error
            raise DataError(message) from error


def _is_of_the_network(error: BaseException | None) -> bool:
    """Tell whether an error comes from no answer, or from no address for a name, of whatever client."""
    while error is not None:
        if isinstance(error, ConnectionError | TimeoutError | socket.gaierror):
            return True
        if {"TransportError", "ClientConnectionError"} & {kind.__name__ for kind in type(error).__mro__}:
            return True  # of httpx and its forks, and of aiohttp, which need not be installed
        error = error.__cause__ or error.__context__
    return False


def _pinned(data_files: list[str]) -> list[str]:
    """Put the commit into addresses of the hub: what is at a branch tomorrow is another text."""
    from huggingface_hub import HfApi, HfFileSystem

    pinned = []
    for address in data_files:
        if address.startswith("hf://datasets/"):
            place: Any = HfFileSystem().resolve_path(address)
            commit = HfApi().dataset_info(place.repo_id, revision=place.revision).sha
            address = f"hf://datasets/{place.repo_id}@{commit}/{place.path_in_repo}"
        pinned.append(address)
    return pinned


def _starts_a_list(path: Path) -> bool:
    with readable(path), open_binary(path) as file:
        return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def _library() -> Any:
    import datasets

    datasets.disable_progress_bars()
    for name in ("datasets", "huggingface_hub"):  # what they log on the way to an error is in the error
        logging.getLogger(name).setLevel(logging.CRITICAL)
    return datasets


def _is_empty(name: str) -> bool:
    """Return whether a file has no bytes; of those elsewhere that is not known."""
    return "://" not in name and Path(name).is_file() and Path(name).stat().st_size == 0
