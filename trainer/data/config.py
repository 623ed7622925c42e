"""The `data` section: which text, how it is cut into tokens, and what is held out. Imports no torch."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from trainer.config.base import Config, PathText, Problem, Renamed
from trainer.config.numbers import Factor
from trainer.data.sources.registry import HfStreamSourceConfig, InstalledSourceConfig, SourceConfig
from trainer.data.tokenizers.registry import ByteTokenizerConfig, TokenizerConfig


class SplitConfig(Config):
    """Validation split, made in each domain by itself."""

    kind: Literal["auto", "hash", "tail"] = "auto"
    """`hash`: whole documents, by the hash of their text. `tail`: the end of the domain's text.

    `auto` takes the tail of a domain that is one document and the hash otherwise; where that leaves a side empty, the
    documents of the one text that is nearest to it go there.
    """
    fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share that is held out."""


Packing = Literal["wrapped", "bfd"]


class MixtureConfig(Config):
    """Shares of the domains in the rows of a run."""

    by: Literal["weight", "tokens"] = "weight"
    """`weight`: a source has its weight's share of the rows, split evenly over its domains, however much text they are.

    `tokens`: a domain's share is proportional to the weight of its source times its training tokens; with equal weights
    all domains are then read equally often.
    """
    temperature: Factor = 1.0
    """For `by: tokens`, whose shares are then proportional to weight * tokens^(1 / temperature): above 1 they are more
    even, so that small domains are read more often than large ones."""

    def problems(self) -> Iterator[Problem]:
        """Refuse a temperature that could have no effect."""
        if self.by == "weight" and self.temperature != 1:
            yield Problem("temperature", f"{self.temperature} has no effect on shares by weight; set by: tokens")


class DataConfig(Config):
    """Training text."""

    old_names = {"packing": Renamed("packing", {"crossing": "wrapped", "whole": "bfd"})}  # noqa: RUF012

    sources: Annotated[list[SourceConfig], Field(min_length=1)] = Field(default=[InstalledSourceConfig()])
    """Sources of the training text."""
    mixture: MixtureConfig = MixtureConfig()
    """Shares of the domains in the rows of the run."""
    packing: Packing = "wrapped"
    """Packing of text into rows, for training and for evaluation.

    `wrapped`: the text of a domain in fixed windows, wherever documents end. `bfd`: whole documents, packed by
    best-fit decreasing, each begun and ended by an end of document, none cut that fits in a row; the rest is padding.
    """
    tokenizer: TokenizerConfig = ByteTokenizerConfig()
    """Tokenizer."""
    split: SplitConfig = SplitConfig()
    """Validation split."""
    cache_dir: PathText = ".cache/tokens"
    """Folder of the tokenised text, built once and reused."""
    workers: Annotated[int, Field(gt=0, le=4096)] | None = None
    """Processes that read text side by side, once; which changes nothing but the time. Null: one for each core."""

    def problems(self) -> Iterator[Problem]:
        """Refuse what a stream cannot have: it has no end."""
        if not any(isinstance(source, HfStreamSourceConfig) for source in self.sources):
            return
        if self.split.kind == "tail":
            yield Problem("split.kind", "tail, but a source is a stream (hf_stream), whose end is never seen; use hash")
        if self.mixture.by == "tokens":
            yield Problem(
                "mixture.by", "tokens, but a source is a stream (hf_stream), whose tokens are not known; use weight"
            )
