"""Every tokenizer's options, and the union of them that `data.tokenizer` accepts. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from trainer.config.base import PathText
from trainer.config.numbers import Count
from trainer.config.plugins import KindConfig, Pluggable

if TYPE_CHECKING:
    from trainer.data.config import DataConfig
    from trainer.data.token_cache.build_cache import IngestProgress
    from trainer.data.tokenizers.base import Tokenizer


class TokenizerOptions(KindConfig):
    """Base class of all tokenizer configs."""

    def build(self, data: DataConfig, *, progress: IngestProgress | None = None) -> Tokenizer:
        """Make the tokenizer; `data` is the section it belongs to."""
        raise NotImplementedError


class ByteTokenizerConfig(TokenizerOptions):
    """One token per UTF-8 byte; 0xFF, which UTF-8 never uses, ends a document."""

    kind: Literal["byte"] = "byte"

    def build(self, data: DataConfig, *, progress: IngestProgress | None = None) -> Tokenizer:
        """Make the tokenizer."""
        from trainer.data.tokenizers.byte import ByteTokenizer

        return ByteTokenizer()


class BPETokenizerConfig(TokenizerOptions):
    """Byte-level BPE, trained on the training side of the run's own text, which then lies in the cache as bytes too."""

    kind: Literal["bpe"] = "bpe"
    vocab_size: Annotated[int, Field(ge=257, le=1 << 20)] = 8192
    """Tokens: 256 bytes, the end of document, and merges."""
    min_frequency: Count = 2
    """Least occurrences of a pair that is merged."""
    max_train_bytes: Count = 1 << 28
    """Text it is trained on: equal parts of all domains, as far as they have it, each spread evenly over the domain."""

    def packages(self) -> Iterator[tuple[str, str]]:
        """Yield the library that encodes text."""
        yield "kind", "tokenizers"

    def build(self, data: DataConfig, *, progress: IngestProgress | None = None) -> Tokenizer:
        """Train the tokenizer, or take it from the cache."""
        from trainer.data.tokenizers.bpe import trained_tokenizer

        return trained_tokenizer(self, data, progress=progress)


class FileTokenizerConfig(TokenizerOptions):
    """A byte-level tokenizer.json (GPT-2, Llama 3, Qwen), or one that falls back to bytes (Llama 2, Mistral, Gemma).

    What it would change in a text is left out: a space before it, NFC, BOS and EOS, padding, truncation.
    """

    kind: Literal["file"] = "file"
    path: PathText
    """A tokenizer.json or the folder it is in, such as another run's; relative to the working directory."""
    end_of_document: Annotated[str, Field(min_length=1)] | None = None
    """Token that stands between documents. Null: the folder's eos_token, else a well-known name."""

    def packages(self) -> Iterator[tuple[str, str]]:
        """Yield the library that encodes text."""
        yield "kind", "tokenizers"

    def build(self, data: DataConfig, *, progress: IngestProgress | None = None) -> Tokenizer:
        """Read the tokenizer."""
        from trainer.data.tokenizers.file import read_tokenizer

        return read_tokenizer(Path(self.path), end_of_document=self.end_of_document)


TokenizerConfig = Annotated[
    ByteTokenizerConfig | BPETokenizerConfig | FileTokenizerConfig,
    Field(discriminator="kind"),
    Pluggable("tokenizers", TokenizerOptions),
]
