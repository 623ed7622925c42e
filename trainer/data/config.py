"""The `data` section: which text, how it is cut into tokens, and what is held out. Imports no torch."""

from typing import Annotated, Literal

from pydantic import Field

from trainer.config.base import Config, PathText
from trainer.data.sources.registry import InstalledSourceConfig, SourceConfig
from trainer.data.tokenizers.registry import ByteTokenizerConfig, TokenizerConfig


class SplitConfig(Config):
    """What is held out for validation, in each domain by itself."""

    kind: Literal["auto", "hash", "tail"] = "auto"
    """`hash`: whole documents, by the hash of their text. `tail`: the end of the domain's text.

    `auto` takes the tail of a domain that is one document and the hash otherwise.
    """
    fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share that is held out."""


class DataConfig(Config):
    """Which text is learned."""

    sources: Annotated[list[SourceConfig], Field(min_length=1)] = Field(default=[InstalledSourceConfig()])
    """Where text comes from; rows are drawn from all of them by weight."""
    tokenizer: TokenizerConfig = ByteTokenizerConfig()
    """How text becomes tokens."""
    split: SplitConfig = SplitConfig()
    """What is held out."""
    cache_dir: PathText = ".cache/tokens"
    """Folder of the tokenised text, built once and reused."""
