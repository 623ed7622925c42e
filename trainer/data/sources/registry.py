"""Options of every data source, and their union for an entry of `data.sources`. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from trainer.config.base import Config, Problem, repeated
from trainer.config.plugins import KindConfig, Pluggable
from trainer.data.records.bad_records import OnBadRecord
from trainer.data.records.registry import DatasetConfig, JsonlRecordsConfig, Paths
from trainer.data.sources.chat_options import ChatSourceConfig, HfChatSourceConfig, HfChatStreamSourceConfig
from trainer.data.sources.document_options import Domain, StreamOptions, TableConfig, Weight

if TYPE_CHECKING:
    from trainer.data.sources.base import Source


class SourceOptions(KindConfig):
    """Base class of the configs of plug-in sources."""

    domain: Domain = "plugin"
    """Name of the domain in per-domain losses."""
    weight: Weight = 1.0
    """Share of the mixture, split evenly over the domains found."""

    def build(self) -> Source:
        """Create the source."""
        raise NotImplementedError


class InstalledSourceConfig(Config):
    """Text that every machine with Turnout has: Python's library, its documentation, torch's C++ headers."""

    kind: Literal["installed"] = "installed"
    domains: Annotated[list[Literal["python", "english", "cpp"]], Field(min_length=1)] = Field(
        default=["python", "english", "cpp"]
    )
    """Domains to read."""
    weight: Weight = 1.0
    """Share of the mixture, split evenly over the domains."""

    def problems(self) -> Iterator[Problem]:
        """Refuse a domain that is listed twice."""
        for twice in repeated(self.domains):
            yield Problem("domains", f"{twice} is named twice; name each domain once")

    def build(self) -> Source:
        """Create the source."""
        from trainer.data.sources.installed import InstalledSource

        return InstalledSource(self.domains, weight=self.weight)


class TextSourceConfig(Config):
    """UTF-8 text files, plain, .gz or .zst; each file is one document."""

    kind: Literal["text"] = "text"
    path: Paths
    """A file, a glob such as corpus/**/*.{txt,md}, a folder (its .txt, .text, .md and .rst files, in all folders
    below), or a list of them; relative to the working directory."""
    domain: Domain = "text"
    """Name of the domain in per-domain losses."""
    on_bad_row: OnBadRecord = "error"
    """Action on a file that cannot be used (empty, not UTF-8, damaged, too large): `error` ends the run and names it;
    `skip` leaves it out, counts it and lists the first ones in runs/NAME/skipped_rows.jsonl."""
    weight: Weight = 1.0
    """Share of the mixture."""

    def build(self) -> Source:
        """Create the source."""
        from trainer.data.sources.text import TextSource

        return TextSource(
            self.path, domain=self.domain, weight=self.weight, skips_bad_records=self.on_bad_row == "skip"
        )


class JsonlSourceConfig(TableConfig, JsonlRecordsConfig):
    """Files with one JSON object a line, plain, .gz or .zst; each line is one document."""

    kind: Literal["jsonl"] = "jsonl"
    domain: Domain = "jsonl"
    """Name of the domain in per-domain losses."""


class HfSourceConfig(TableConfig, DatasetConfig):
    """Whatever Hugging Face `datasets` reads; each record is one document."""

    kind: Literal["hf"] = "hf"
    domain: Domain = "hf"
    """Name of the domain in per-domain losses."""


class HfStreamSourceConfig(TableConfig, StreamOptions):
    """Streamed `hf` source for a corpus too large to ingest: read again in every epoch, a block ahead of training.

    Training rows are shuffled within a block of `block_tokens`; blocks keep the order of the data set.
    """

    kind: Literal["hf_stream"] = "hf_stream"
    domain: Domain = "hf_stream"
    """Name of the domain in per-domain losses."""


SourceConfig = Annotated[
    InstalledSourceConfig
    | TextSourceConfig
    | JsonlSourceConfig
    | HfSourceConfig
    | HfStreamSourceConfig
    | ChatSourceConfig
    | HfChatSourceConfig
    | HfChatStreamSourceConfig,
    Field(discriminator="kind"),
    Pluggable("sources", SourceOptions),
]
