"""Data sets that Hugging Face `datasets` reads, streamed: nothing is copied before it is read.

JSON Lines on this machine are read by our own reader: theirs makes a string of a number, and null of a key that is
missing, once it has seen the first 10 MB.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from trainer.data.rows.base import Part, Row, Rows
from trainer.data.rows.jsonl import JsonlRows, Lines
from trainer.data.rows.registry import FORMATS, DatasetConfig
from trainer.data.sources.files import find_files, open_binary, readable
from trainer.errors import DataError

_BATCH_ROWS = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard(Part):
    """One of a data set's shards, which are its files where they are local."""

    index: int
    name: str


class HfRows(Rows):
    """A split of a data set."""

    def __init__(self, config: DatasetConfig, *, columns: Iterable[str] = ()) -> None:
        """Take the options; `columns` are the only ones that are wanted, or none for all."""
        self._config = config
        self._columns = sorted(set(columns))

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
        versions = getattr(self._files, "origin_metadata", [])  # of a web server, the ETag
        return "\n".join([*remote, *("/".join(version) for version in versions)])

    def parts(self) -> Sequence[Part]:
        """Return the shards.

        Raises:
            DataError: if the data set or its split cannot be found or opened.
        """
        if self._is_local_json:
            return self._lines.parts()
        with self._explained():
            num_shards = self._stream.num_shards
        names = self._names if len(self._names) == num_shards else [f"{self} shard {i}" for i in range(num_shards)]
        sizes = [Path(name).stat().st_size if Path(name).is_file() else 0 for name in names]
        return [
            Shard(index=i, name=name, size_bytes=size) for i, (name, size) in enumerate(zip(names, sizes, strict=True))
        ]

    def read(self, part: Part) -> Iterator[Row]:
        """Yield the rows of a shard.

        Raises:
            DataError: naming file and row, if it cannot be read.
        """
        if isinstance(part, Lines):
            yield from self._lines.read(part)
            return
        assert isinstance(part, Shard), "parts() gave it"
        number = 0
        with self._explained():
            shard = self._stream.shard(self._stream.num_shards, part.index)
            tables = shard.with_format("arrow").iter(batch_size=_BATCH_ROWS)
        while True:
            with self._explained(f"{part.name}: row {number + 1} or one of the next {_BATCH_ROWS}"):
                table = next(tables, None)
                rows = [] if table is None else table.to_pylist()
            if table is None:
                break
            for values in rows:
                number += 1
                yield Row(f"{part.name}: row {number}", values)
        if number == 0:
            raise DataError(f"{part.name}: holds no rows; every file needs some; remove it")

    def __str__(self) -> str:
        return ":".join(part for part in (self._config.path, self._config.name, self._config.split) if part)

    @cached_property
    def _builder(self) -> Any:
        datasets = _library()
        config = self._config
        if config.path in FORMATS and config.data_files is not None:
            local = [config.data_files] if isinstance(config.data_files, str) else config.data_files
            find_files([pattern for pattern in local if "://" not in pattern])  # says what is wrong more clearly
        options = {"keep_default_na": False} if config.path == "csv" else {}  # `NA` is a text like any other
        with self._explained():
            return datasets.load_dataset_builder(
                config.path,
                name=config.name,
                revision=config.revision,
                data_files=None if config.data_files is None else {config.split: _pinned(config.data_files)},
                data_dir=config.data_dir,
                **options,
            )

    @cached_property
    def _stream(self) -> Any:
        with self._explained():
            stream = self._builder.as_streaming_dataset(split=self._config.split)
            if self._columns and stream.features is not None:
                # A column that is not there is reported with the first row, beside those that are.
                wanted = {column if column in stream.features else column.split(".")[0] for column in self._columns}
                if wanted <= set(stream.features):
                    stream = stream.select_columns(sorted(wanted))
            return stream

    @cached_property
    def _names(self) -> list[str]:
        """Paths and addresses of the split's files; none for a data set that a script makes."""
        return [str(name) for name in self._files]

    @cached_property
    def _files(self) -> Sequence[str]:
        data_files = self._builder.config.data_files or {}
        if data_files and self._config.split not in data_files:
            known = ", ".join(str(split) for split in data_files)
            raise DataError(f"{self}: no split {self._config.split!r}; the data set has {known}; correct `split`")
        return data_files.get(self._config.split, [])

    @cached_property
    def _is_local_json(self) -> bool:
        """Whether these are JSON Lines; a file may also be one list, which the library reads whole."""
        if self._builder.name != "json" or not self._names or self.origin():
            return False
        return all(not _starts_a_list(path) for path in self.files())

    @cached_property
    def _lines(self) -> JsonlRows:
        return JsonlRows(self._names)

    @contextmanager
    def _explained(self, where: str = "") -> Iterator[None]:
        """Make one line of whatever the library raises."""
        try:
            yield
        except DataError:
            raise
        except ConnectionError as error:
            raise DataError(
                f"{self}: cannot be reached ({_line(error)}); the hub or its cache is needed; check the network, or "
                "give local files"
            ) from error
        except MemoryError:
            raise
        except Exception as error:  # of any library that reads a format
            reason = _line(error) or type(error).__name__
            raise DataError(f"{where or self}: cannot be read ({reason}); correct the data or its options") from error


def _pinned(data_files: str | list[str]) -> list[str]:
    """Put the commit into addresses of the hub: what is at a branch tomorrow is another text."""
    from huggingface_hub import HfApi, HfFileSystem

    pinned = []
    for address in [data_files] if isinstance(data_files, str) else data_files:
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


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else ""
