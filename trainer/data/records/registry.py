"""Options of every record reader, and their union for the `rows` of a task. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AfterValidator, Field

from trainer.config.base import Config, PathText, Problem, expand_home
from trainer.data.records.find_files import FORMATS

if TYPE_CHECKING:
    from trainer.data.records.base import RecordReader

Paths = PathText | Annotated[list[PathText], Field(min_length=1)]
Name = Annotated[str, Field(min_length=1, max_length=1000)]


class RecordsOptions(Config):
    """Base class of the options of record readers."""

    def reader(self) -> RecordReader:
        """Create the reader."""
        raise NotImplementedError


class JsonlRecordsConfig(RecordsOptions):
    """Files with one JSON object a line, plain, .gz or .zst."""

    kind: Literal["jsonl"] = "jsonl"
    path: Paths
    """A file, a glob such as rows/*.{jsonl,jsonl.gz}, a folder (its .jsonl and .ndjson files, in all folders below), or
    a list of them; relative to the working directory."""

    def reader(self) -> RecordReader:
        """Create the reader."""
        from trainer.data.records.json_lines import JsonlReader

        return JsonlReader(self.path)


class DatasetConfig(RecordsOptions):
    """Whatever Hugging Face `datasets` reads: a data set of the hub, or local parquet, arrow, csv, json and text."""

    path: Annotated[Name, AfterValidator(expand_home)]
    """Name of a data set on the hub, a local folder, or a format (parquet, arrow, csv, json, text) of `data_files`."""
    name: Name | None = None
    """Configuration of the data set, where it has several."""
    revision: Name | None = None
    """Branch, tag or commit of a data set on the hub. Only a commit always stands for the same data."""
    split: Name = "train"
    """Split of the data set, by its authors' name."""
    data_files: Paths | None = None
    """Files, globs or addresses, relative to the data set, or to the working directory for a format. For a format also
    a folder: all its files of that format."""
    data_dir: PathText | None = None
    """Folder inside the data set."""

    def problems(self) -> Iterator[Problem]:
        """Refuse a format without files."""
        yield from super().problems()
        if self.path in FORMATS and self.data_files is None:
            yield Problem("path", f"{self.path} is a format; name its files with data_files")
        if self.path == "pandas":
            yield Problem("path", "pandas reads pickles, which can run code; write the data as parquet")

    def packages(self) -> Iterator[tuple[str, str]]:
        """Yield the library that reads them."""
        yield "kind", "datasets"

    def reader(self) -> RecordReader:
        """Create the reader."""
        from trainer.data.records.hf import HfReader

        return HfReader(
            self.path,
            name=self.name,
            revision=self.revision,
            split=self.split,
            data_files=[self.data_files] if isinstance(self.data_files, str) else self.data_files or [],
            data_dir=self.data_dir,
            columns=self.columns(),
            skips_bad_records=self.skips_bad_records(),
        )

    def columns(self) -> set[str]:
        """Return the columns to read; empty for all."""
        return set()

    def skips_bad_records(self) -> bool:
        """Return whether unusable records are skipped."""
        return False


class HfRecordsConfig(DatasetConfig):
    """Whatever Hugging Face `datasets` reads: a data set of the hub, or local parquet, arrow, csv, json and text."""

    kind: Literal["hf"] = "hf"


RecordsConfig = Annotated[JsonlRecordsConfig | HfRecordsConfig, Field(discriminator="kind")]
