"""Options of every data source, and their union for an entry of `data.sources`. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from trainer.config.base import Config, Problem, repeated
from trainer.config.nodes import shown
from trainer.config.plugins import KindConfig, Pluggable
from trainer.data.records.bad_records import OnBadRecord
from trainer.data.records.filters import FilterConfig
from trainer.data.records.registry import DatasetConfig, JsonlRecordsConfig, Name, Paths, RecordsOptions
from trainer.data.records.template import Template, TemplateText
from trainer.data.sources.base import DOMAIN_NAME

if TYPE_CHECKING:
    from trainer.data.sources.base import Source

Domain = Annotated[str, Field(pattern=f"^{DOMAIN_NAME.pattern}$")]
Weight = Annotated[float, Field(ge=1e-18, le=1e18)]
"""Only ratios matter, so numbers of tokens can be given."""


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


class DocumentTemplates(RecordsOptions):
    """Templates that make a document of a record."""

    text: TemplateText = "{text}"
    """Text to learn, with columns in braces: "{en} = {de}"; {a.b} is key b of a, {stars:d} and {price:g} are numbers,
    {label:bad|good} names the numbers 0 and 1."""
    prompt: TemplateText = ""
    """Prompt, read before `text` and not learned: none of its tokens is a target."""

    def problems(self) -> Iterator[Problem]:
        """Refuse a template without columns."""
        yield from super().problems()
        if not Template(self.text).columns:
            yield Problem("text", f"{shown(self.text)} has no column; write {{column}} where its text belongs")


class DocumentsOptions(RecordsOptions):
    """Options of every source whose records become documents."""

    filters: list[FilterConfig] = Field(default=[])
    """Only records that pass all of these are read."""
    on_bad_row: OnBadRecord = "error"
    """Action on a record that cannot be used (not JSON, null, of another type, without text, too large), and on a file
    without records: `error` ends the run and names its place; `skip` leaves it out, counts it and lists the first ones
    in runs/NAME/skipped_rows.jsonl. A file that cannot be read to its end is always an error."""
    domain_key: Name | None = None
    """Column with the document's domain. Null: all documents belong to `domain`."""
    domain: Domain
    """Name of the domain in per-domain losses."""
    weight_key: Name | None = None
    """Column with the document's weight in the training loss, a number of at least 0: the loss is the sum of weight
    times nats over all targets of the global batch, divided by the sum of their weights. A document of weight 0 is read
    and not learned. Evaluation does not use weights. Null: all weigh 1."""
    weight: Weight = 1.0
    """Share of the mixture, split evenly over the domains found."""

    def skips_bad_records(self) -> bool:
        """Return whether unusable records are skipped."""
        return self.on_bad_row == "skip"

    def build(self) -> Source:
        """Create the source."""
        raise NotImplementedError


class TableConfig(DocumentsOptions, DocumentTemplates):
    """Options for turning records into documents."""

    def columns(self) -> set[str]:
        """Return the columns to read."""
        named = [*Template(self.text).columns, *Template(self.prompt).columns, *(f.column for f in self.filters)]
        return {*named, *(key for key in (self.domain_key, self.weight_key) if key is not None)}

    def build(self) -> Source:
        """Create the source."""
        from trainer.data.sources.table import TableSource

        return TableSource(
            self.reader(),
            domain=self.domain,
            text=self.text,
            prompt=self.prompt,
            filters=self.filters,
            domain_key=self.domain_key,
            weight_key=self.weight_key,
            weight=self.weight,
            skips_bad_records=self.skips_bad_records(),
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


class StreamOptions(DocumentsOptions, DatasetConfig):
    """Options of streamed sources: read again in every epoch, a block ahead of training.

    Training rows are shuffled within a block of `block_tokens`; blocks keep the order of the data set.
    """

    block_tokens: Annotated[int, Field(gt=0, le=1 << 40)] = 1 << 24
    """Tokens of a block: read ahead, shuffled among themselves and kept on the disk (three blocks at a time).
    Evaluation uses the held-out text of the first block; that of later blocks is never used."""

    def problems(self) -> Iterator[Problem]:
        """Refuse options that need the whole corpus to be read first."""
        yield from super().problems()
        if self.domain_key is not None:
            yield Problem("domain_key", "a stream has one domain; give each domain a source of its own, with filters")


class HfStreamSourceConfig(TableConfig, StreamOptions):
    """Streamed `hf` source for a corpus too large to ingest: read again in every epoch, a block ahead of training.

    Training rows are shuffled within a block of `block_tokens`; blocks keep the order of the data set.
    """

    kind: Literal["hf_stream"] = "hf_stream"
    domain: Domain = "hf_stream"
    """Name of the domain in per-domain losses."""


SourceConfig = Annotated[
    InstalledSourceConfig | TextSourceConfig | JsonlSourceConfig | HfSourceConfig | HfStreamSourceConfig,
    Field(discriminator="kind"),
    Pluggable("sources", SourceOptions),
]
