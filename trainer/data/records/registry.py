"""Options of every source of rows, and the union of them that a task's `rows` accepts. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AfterValidator, Field

from trainer.config.base import Config, PathText, Problem, at_home

if TYPE_CHECKING:
    from trainer.data.records.base import Rows

Paths = PathText | Annotated[list[PathText], Field(min_length=1)]
FORMATS = ("parquet", "arrow", "csv", "json", "text")
"""File formats that are allowed as `path`, with `data_files`."""

Name = Annotated[str, Field(min_length=1, max_length=1000)]


class JsonlRowsConfig(Config):
    """Files with one JSON object a line, plain, .gz or .zst."""

    kind: Literal["jsonl"] = "jsonl"
    path: Paths
    """A file, a glob such as rows/*.{jsonl,jsonl.gz}, a folder (its .jsonl and .ndjson files, in all folders below), or
    a list of them; relative to the working directory."""

    def rows(self) -> Rows:
        """Make what reads them."""
        from trainer.data.records.jsonl import JsonlRows

        return JsonlRows(self.path)


class DatasetConfig(Config):
    """Whatever Hugging Face `datasets` reads: a data set of the hub, or local parquet, arrow, csv, json and text."""

    path: Annotated[Name, AfterValidator(at_home)]
    """Name of a data set on the hub, a local folder, or a format (parquet, arrow, csv, json, text) of `data_files`."""
    name: Name | None = None
    """Configuration of the data set, where it has several."""
    revision: Name | None = None
    """Branch, tag or commit of a data set on the hub. A commit stays what it is."""
    split: Name = "train"
    """Split of the data set, by its authors' name."""
    data_files: Paths | None = None
    """Files, globs or addresses, relative to the data set, or to the working directory for a format. Of a format also a
    folder: all its files of that format."""
    data_dir: PathText | None = None
    """Folder inside the data set."""

    def problems(self) -> Iterator[Problem]:
        """Refuse a format without files."""
        yield from super().problems()
        if self.path in FORMATS and self.data_files is None:
            yield Problem("path", f"{self.path} is a format; say which files with data_files")
        if self.path == "pandas":
            yield Problem("path", "pandas reads pickles, which can run code; write the data as parquet")

    def packages(self) -> Iterator[tuple[str, str]]:
        """Yield the library that reads them."""
        yield "path", "datasets"

    def rows(self) -> Rows:
        """Make what reads them."""
        from trainer.data.records.hf import HfRows

        return HfRows(self, columns=self.columns(), skips_bad_rows=self.skips_bad_rows())

    def columns(self) -> set[str]:
        """Return every column that is read; none means all."""
        return set()

    def skips_bad_rows(self) -> bool:
        """Return whether a row that cannot be used is left out."""
        return False


class HfRowsConfig(DatasetConfig):
    """Whatever Hugging Face `datasets` reads: a data set of the hub, or local parquet, arrow, csv, json and text."""

    kind: Literal["hf"] = "hf"


RowsConfig = Annotated[JsonlRowsConfig | HfRowsConfig, Field(discriminator="kind")]
