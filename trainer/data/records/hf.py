"""Reader of data sets by Hugging Face `datasets`, streamed: nothing is copied first.

Local JSON Lines files go through `JsonlReader` instead: once past its first 10 MB, the library turns numbers into
strings and missing keys into null.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from trainer.data.records.bad_records import BadRecord
from trainer.data.records.base import Record, RecordReader, SourcePart
from trainer.data.records.find_files import FORMATS, describe_folders, find_files
from trainer.data.records.hf_library import (
    collect_skipped_lines,
    import_datasets,
    library_errors,
    pin_commits,
    table_values,
    to_record,
)
from trainer.data.records.json_lines import JsonlReader, LineRange, no_records
from trainer.data.records.text_files import open_binary, readable
from trainer.errors import DataError

_BATCH_RECORDS = 100  # in memory at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetShard(SourcePart):
    """One shard of a data set; for local files, a file."""

    index: int | None  # None for a file of zero bytes, which the library cannot read as any format
    name: str


class HfReader(RecordReader):
    """Reads one split of a data set."""

    def __init__(
        self,
        path: str,
        *,
        name: str | None = None,
        revision: str | None = None,
        split: str = "train",
        data_files: Sequence[str] = (),
        data_dir: str | None = None,
        columns: Iterable[str] = (),
        skips_bad_records: bool = False,
    ) -> None:
        """Create the reader, with the options of `DatasetConfig`; nothing is opened yet.

        Without `columns`, all are read. Unless `skips_bad_records`, CSV lines with too many fields end the file.
        """
        self._path, self._name, self._revision, self._split = path, name, revision, split
        self._data_files, self._data_dir = list(data_files), data_dir
        self._columns = sorted(set(columns))
        self._skips_bad_records = skips_bad_records

    def files(self) -> list[Path]:
        """Return the local files of the split."""
        return [Path(name) for name in self._names if "://" not in name]

    def origin(self) -> str:
        """Return the addresses of remote files, with their commit or another mark of their version."""
        remote = [name for name in self._names if "://" in name]
        if all(name.startswith("hf://") for name in remote):
            return "\n".join(remote)
        of_split = self._loaded[0].config.data_files[self._split]
        versions = getattr(of_split, "origin_metadata", [])  # for a web server, the ETag
        return "\n".join([*remote, *("/".join(version) for version in versions)])

    def parts(self) -> Sequence[SourcePart]:
        """Return the shards of the split."""
        if self._is_local_json:
            return JsonlReader(self._names).parts()
        empty = [DatasetShard(index=None, name=name, size_bytes=0) for name in self._names if _is_empty(name)]
        names = [name for name in self._names if not _is_empty(name)]
        if empty and not names:
            return empty
        with self._library_errors():
            num_shards = self._stream.num_shards
        names = names if len(names) == num_shards else [f"{self} shard {i}" for i in range(num_shards)]
        sizes = [Path(name).stat().st_size if Path(name).is_file() else 0 for name in names]
        named = enumerate(zip(names, sizes, strict=True))
        return [*empty, *(DatasetShard(index=i, name=name, size_bytes=size) for i, (name, size) in named)]

    def entries(self, part: SourcePart) -> Iterator[Record | BadRecord]:
        """Yield the records of a shard, with a `BadRecord` in place of each unusable one.

        Raises DataError naming the file and the approximate record, if the library cannot continue.
        """
        if isinstance(part, LineRange):
            yield from JsonlReader(self._names).entries(part)
            return
        assert isinstance(part, DatasetShard), "parts() gave it"
        if part.index is None:
            yield no_records(part.name)
            return
        number = 0
        with self._library_errors():
            shard = self._stream.shard(self._stream.num_shards, part.index)
            tables = shard.with_format("arrow").iter(batch_size=_BATCH_RECORDS)
        while True:
            where = f"{part.name}: record {number + 1} or one of the next {_BATCH_RECORDS}"
            try:
                with self._library_errors(where), collect_skipped_lines(part.name) as skipped:
                    table = next(tables, None)
                    batch = [] if table is None else table_values(table)
            except BadRecord as bad:  # the library cannot continue; it can only where such lines are to be skipped
                yield bad
                return
            yield from skipped
            if table is None:
                break
            for values in batch:
                number += 1
                yield to_record(values, f"{part.name}: record {number}")
        if number == 0:
            yield no_records(part.name)

    def __str__(self) -> str:
        return ":".join(part for part in (self._path, self._name, self._split) if part)

    def folder_notes(self) -> list[str]:
        """Return a line for each folder: which of its files are read and which are not."""
        return describe_folders(self._data_files, FORMATS[self._path]) if self._path in FORMATS else []

    def _expanded_data_files(self) -> list[str]:
        """Expand braces and folders in `data_files`, which the library does not; raise DataError for missing files."""
        if self._path not in FORMATS:
            return self._data_files
        expanded: list[str] = []
        for pattern in self._data_files:
            files = [] if "://" in pattern else find_files(pattern, FORMATS[self._path])
            needs_expansion = "{" in pattern or Path(pattern).is_dir()
            expanded += [str(path) for path in files] if files and needs_expansion else [pattern]
        return expanded

    @cached_property
    def _loaded(self) -> tuple[Any, dict[str, list[str]]]:
        """The library's builder without the empty files, and the names of all files by split."""
        datasets = import_datasets()
        options = {"keep_default_na": False} if self._path == "csv" else {}  # `NA` is a text like any other
        with self._library_errors():
            builder = datasets.load_dataset_builder(
                self._path,
                name=self._name,
                revision=self._revision,
                data_files={self._split: pin_commits(self._expanded_data_files())} if self._data_files else None,
                data_dir=self._data_dir,
                **options,
            )
        self._refuse_outside_files(builder)
        if builder.name == "parquet":  # by default it reads a whole row group at a time
            builder.config.batch_size = _BATCH_RECORDS
        if builder.name == "csv" and self._skips_bad_records:
            builder.config.on_bad_lines = "warn"
        files = builder.config.data_files or {}
        named = {str(split): [str(name) for name in names] for split, names in files.items()}
        for names in files.values():
            names[:] = [name for name in names if not _is_empty(str(name))]
        return builder, named

    def _refuse_outside_files(self, builder: Any) -> None:
        """Refuse files outside a local data set, which its README.md may name; on the hub the library does it."""
        if self._data_files or not Path(self._path).is_dir():
            return
        roots = [os.path.realpath(root) for root in (self._path, Path(self._path, self._data_dir or "."))]
        for name in (str(name) for names in (builder.config.data_files or {}).values() for name in names):
            path = Path(os.path.normpath(name))
            if "://" in name or "::" in name or not any(path.is_relative_to(root) for root in roots):
                raise DataError(
                    f"{self}: its README.md names {name}, which is not in {self._path}; a data set may only read its "
                    "own files; correct README.md, or name files by data_files"
                )

    @cached_property
    def _stream(self) -> Any:
        """The library's stream of all files that are not empty."""
        with self._library_errors():
            stream = self._loaded[0].as_streaming_dataset(split=self._split)
            if self._columns and stream.features is not None:
                # A missing column is reported with the first record, together with the columns that exist.
                wanted = {column if column in stream.features else column.split(".")[0] for column in self._columns}
                if wanted <= set(stream.features):
                    stream = stream.select_columns(sorted(wanted))
            return stream

    @cached_property
    def _names(self) -> list[str]:
        """Paths and addresses of the split's files; empty for a data set made by a script."""
        named = self._loaded[1]
        if named and self._split not in named:
            existing = ", ".join(named)
            raise DataError(f"{self}: no split {self._split!r}; the data set has {existing}; correct `split`")
        return named.get(self._split, [])

    @cached_property
    def _is_local_json(self) -> bool:
        """Whether all files are local JSON Lines; a .json file may also be one list, which the library reads."""
        if self._loaded[0].name != "json" or not self._names or self.origin():
            return False
        return all(not _starts_with_list(path) for path in self.files())

    def _library_errors(self, where: str = "") -> AbstractContextManager[None]:
        addresses = [pattern for pattern in self._data_files if "://" in pattern] or [str(self)]
        return library_errors(where or str(self), addresses=addresses)


def _starts_with_list(path: Path) -> bool:
    with readable(path), open_binary(path) as file:
        return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def _is_empty(name: str) -> bool:
    """Return whether a local file has no bytes; False for an address."""
    return "://" not in name and Path(name).is_file() and Path(name).stat().st_size == 0
