"""Every data source's options, and the union of them that an entry of `data.sources` accepts. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from trainer.config.base import Config, Problem, repeated
from trainer.config.nodes import shown
from trainer.config.plugins import KindConfig, Pluggable
from trainer.data.records.bad_records import OnBadRow
from trainer.data.records.filters import FilterConfig
from trainer.data.records.registry import DatasetConfig, JsonlRowsConfig, Name, Paths
from trainer.data.records.template import Template, TemplateText

if TYPE_CHECKING:
    from trainer.data.sources.base import Source

Domain = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Weight = Annotated[float, Field(ge=1e-18, le=1e18)]
"""Only ratios count: tokens of a corpus will do."""


class SourceOptions(KindConfig):
    """Base class of the configs of sources that are plug-ins."""

    domain: Domain = "plugin"
    """Name of the domain in per-domain losses."""
    weight: Weight = 1.0
    """Share of the mixture, split evenly over the domains found."""

    def build(self) -> Source:
        """Make the source."""
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
        """Refuse a domain that is named twice."""
        for twice in repeated(self.domains):
            yield Problem("domains", f"{twice} is named twice; name each domain once")

    def build(self) -> Source:
        """Make the source."""
        from trainer.data.sources.installed import InstalledSource

        return InstalledSource(self)


class TextSourceConfig(Config):
    """UTF-8 text files, plain, .gz or .zst; each file is one document."""

    kind: Literal["text"] = "text"
    path: Paths
    """A file, a glob such as corpus/**/*.{txt,md}, a folder (its .txt, .text, .md and .rst files, in all folders
    below), or a list of them; relative to the working directory."""
    domain: Domain = "text"
    """Name of the domain in per-domain losses."""
    on_bad_row: OnBadRow = "error"
    """Action on a file that cannot be used (empty, not UTF-8, damaged, too large): `error` ends the run with its
    name; `skip` leaves it out, counts it and lists the first ones in runs/NAME/skipped_rows.jsonl."""
    weight: Weight = 1.0
    """Share of the mixture."""

    def build(self) -> Source:
        """Make the source."""
        from trainer.data.sources.text import TextSource

        return TextSource(self)


class TableConfig(Config):
    """Options that turn rows into documents."""

    text: TemplateText = "{text}"
    """Text to learn, with columns in braces: "{en} = {de}"; {a.b} is b inside a, {stars:d} and {price:g} are numbers,
    {label:bad|good} names the numbers 0 and 1."""
    prompt: TemplateText = ""
    """Prompt, read before `text` and not learned: no token of it is a target."""
    filters: list[FilterConfig] = Field(default=[])
    """Rows that do not pass all of these are left out."""
    on_bad_row: OnBadRow = "error"
    """Action on a row that cannot be used (not JSON, null, of another type, without text, too large), and on a
    file without rows: `error` ends the run with its place; `skip` leaves it out, counts it and lists the first ones in
    runs/NAME/skipped_rows.jsonl. A file that cannot be read to its end is an error all the same."""
    domain_key: Name | None = None
    """Column with the document's domain. Null: all documents are of `domain`."""
    domain: Domain
    """Name of the domain in per-domain losses."""
    weight: Weight = 1.0
    """Share of the mixture, split evenly over the domains found."""

    def problems(self) -> Iterator[Problem]:
        """Refuse a text that is the same for all rows."""
        yield from super().problems()
        if not Template(self.text).columns:
            yield Problem("text", f"{shown(self.text)} has no column; write {{column}} where its text belongs")

    def columns(self) -> set[str]:
        """Return every column that is read."""
        named = [*Template(self.text).columns, *Template(self.prompt).columns, *(f.column for f in self.filters)]
        return {*named, self.domain_key} if self.domain_key is not None else set(named)

    def skips_bad_rows(self) -> bool:
        """Return whether a row that cannot be used is left out."""
        return self.on_bad_row == "skip"


class JsonlSourceConfig(TableConfig, JsonlRowsConfig):
    """Files with one JSON object a line, plain, .gz or .zst; each line is one document."""

    kind: Literal["jsonl"] = "jsonl"
    domain: Domain = "jsonl"
    """Name of the domain in per-domain losses."""

    def build(self) -> Source:
        """Make the source."""
        from trainer.data.sources.table import TableSource

        return TableSource(self.rows(), self)


class HfSourceConfig(TableConfig, DatasetConfig):
    """Whatever Hugging Face `datasets` reads; each row is one document."""

    kind: Literal["hf"] = "hf"
    domain: Domain = "hf"
    """Name of the domain in per-domain losses."""

    def build(self) -> Source:
        """Make the source."""
        from trainer.data.sources.table import TableSource

        return TableSource(self.rows(), self)


class HfStreamSourceConfig(TableConfig, DatasetConfig):
    """Streamed `hf` source for a corpus too large to ingest: read again in every epoch, some million tokens ahead.

    Rows are shuffled inside a block of `block_tokens`, and blocks come in the order of the data set.
    """

    kind: Literal["hf_stream"] = "hf_stream"
    domain: Domain = "hf_stream"
    """Name of the domain in per-domain losses."""
    block_tokens: Annotated[int, Field(gt=0, le=1 << 40)] = 1 << 24
    """Tokens that are read ahead, kept on the disk (three times as many) and shuffled among themselves. What is held
    out of the first block is evaluated on; what is held out of others is never read."""

    def problems(self) -> Iterator[Problem]:
        """Refuse what only a corpus that is read beforehand can have."""
        yield from super().problems()
        if self.domain_key is not None:
            yield Problem("domain_key", "a stream is of one domain; give each domain a source of its own, with filters")

    def build(self) -> Source:
        """Make the source."""
        from trainer.data.sources.table import TableSource

        return TableSource(self.rows(), self)


SourceConfig = Annotated[
    InstalledSourceConfig | TextSourceConfig | JsonlSourceConfig | HfSourceConfig | HfStreamSourceConfig,
    Field(discriminator="kind"),
    Pluggable("sources", SourceOptions),
]
