"""Every data source's options, and the union of them that an entry of `data.sources` accepts. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, PositiveFloat

from trainer.config.base import Config, PathText, Problem

if TYPE_CHECKING:
    from trainer.data.sources.base import Source

Domain = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Paths = PathText | Annotated[list[PathText], Field(min_length=1)]


class InstalledSourceConfig(Config):
    """Text that every machine with Turnout has: Python's library, its documentation, torch's C++ headers."""

    kind: Literal["installed"] = "installed"
    domains: Annotated[list[Literal["python", "english", "cpp"]], Field(min_length=1)] = Field(
        default=["python", "english", "cpp"]
    )
    """Which of the three domains to read."""
    weight: PositiveFloat = 1.0
    """Share of the mixture, split evenly over the domains."""

    def problems(self) -> Iterator[Problem]:
        """Refuse a domain that is named twice."""
        for twice in sorted({d for d in self.domains if self.domains.count(d) > 1}):
            yield Problem("domains", f"{twice} is named twice; name each domain once")

    def build(self) -> Source:
        """Make the source."""
        from trainer.data.sources.installed import InstalledSource

        return InstalledSource(self)


class TextSourceConfig(Config):
    """UTF-8 text files, plain or .gz; each file is one document."""

    kind: Literal["text"] = "text"
    path: Paths
    """A file, a glob such as corpus/**/*.txt, or a list of them; relative to the working directory."""
    domain: Domain = "text"
    """Name of the domain in per-domain losses."""
    weight: PositiveFloat = 1.0
    """Share of the mixture."""

    def build(self) -> Source:
        """Make the source."""
        from trainer.data.sources.text import TextSource

        return TextSource(self)


class JsonlSourceConfig(Config):
    """Files with one JSON object a line, plain or .gz; each line is one document."""

    kind: Literal["jsonl"] = "jsonl"
    path: Paths
    """A file, a glob, or a list of them; relative to the working directory."""
    text_key: Annotated[str, Field(min_length=1)] = "text"
    """Key of the document's text."""
    domain_key: Annotated[str, Field(min_length=1)] | None = None
    """Key of the document's domain. Null: all documents are of `domain`."""
    domain: Domain = "jsonl"
    """Name of the domain in per-domain losses."""
    weight: PositiveFloat = 1.0
    """Share of the mixture, split evenly over the domains found."""

    def build(self) -> Source:
        """Make the source."""
        from trainer.data.sources.jsonl import JsonlSource

        return JsonlSource(self)


SourceConfig = Annotated[InstalledSourceConfig | TextSourceConfig | JsonlSourceConfig, Field(discriminator="kind")]
