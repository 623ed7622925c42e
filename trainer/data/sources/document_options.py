"""Options of sources whose records become documents. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from trainer.config.base import Problem
from trainer.config.nodes import shown
from trainer.data.records.bad_records import OnBadRecord
from trainer.data.records.filters import FilterConfig
from trainer.data.records.registry import DatasetConfig, Name, RecordsOptions
from trainer.data.records.template import Template, TemplateText
from trainer.data.sources.base import DOMAIN_NAME

if TYPE_CHECKING:
    from trainer.data.sources.base import Source
    from trainer.data.sources.record_source import RecordRules

Domain = Annotated[str, Field(pattern=f"^{DOMAIN_NAME.pattern}$")]
Weight = Annotated[float, Field(ge=1e-18, le=1e18)]
"""Only ratios matter, so numbers of tokens can be given."""


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

    def rules(self) -> RecordRules:
        """Return what all sources of records are built from."""
        from trainer.data.sources.record_source import RecordRules

        return RecordRules(
            domain=self.domain,
            filters=self.filters,
            domain_key=self.domain_key,
            weight_key=self.weight_key,
            weight=self.weight,
            skips_bad_records=self.skips_bad_records(),
        )

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

        return TableSource(self.reader(), self.rules(), text=self.text, prompt=self.prompt)


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
