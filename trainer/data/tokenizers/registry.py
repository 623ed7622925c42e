"""Options of every tokenizer, and their union for `data.tokenizer`. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from trainer.config.base import PathText, Problem
from trainer.config.numbers import Count
from trainer.config.plugins import KindConfig, Pluggable

if TYPE_CHECKING:
    from trainer.data.tokenizers.base import Tokenizer

_LEAST_WITH_CHAT = 259  # 256 bytes, the end of document, two markers


class TokenizerOptions(KindConfig):
    """Base class of all tokenizer configs."""

    def build(self) -> Tokenizer:
        """Create the tokenizer."""
        raise NotImplementedError


class ByteTokenizerConfig(TokenizerOptions):
    """One token per UTF-8 byte; 0xFF, which UTF-8 never uses, ends a document."""

    kind: Literal["byte"] = "byte"

    def build(self) -> Tokenizer:
        """Create the tokenizer."""
        from trainer.data.tokenizers.byte import ByteTokenizer

        return ByteTokenizer()


class BPETokenizerConfig(TokenizerOptions):
    """Byte-level BPE, trained on the training side of the run's own text, which is then cached as bytes too."""

    # It has no build(): training needs a corpus (trainer/data/corpus.py: build_tokenizer).
    kind: Literal["bpe"] = "bpe"
    vocab_size: Annotated[int, Field(ge=257, le=1 << 20)] = 8192
    """Tokens: 256 bytes, the end of document, those of `chat`, and merges."""
    min_frequency: Count = 2
    """Least occurrences of a pair that is merged."""
    max_train_bytes: Count = 1 << 28
    """Size of the text to train on: equal parts of all domains where they are large enough, spread evenly over each."""
    chat: bool = False
    """Also reserve <|im_start|> and <|im_end|>, which mark the turns of chats (ChatML)."""

    def problems(self) -> Iterator[Problem]:
        """Refuse a vocabulary without room for the markers."""
        if self.chat and self.vocab_size < _LEAST_WITH_CHAT:
            message = f"{self.vocab_size} has no room for the markers of chat: true; use at least {_LEAST_WITH_CHAT}"
            yield Problem("vocab_size", message)

    def packages(self) -> Iterator[tuple[str, str]]:
        """Yield the library that encodes text."""
        yield "kind", "tokenizers"


class FileTokenizerConfig(TokenizerOptions):
    """A byte-level tokenizer.json (GPT-2, Llama 3, Qwen), or one with byte fallback (Llama 2, Mistral, Gemma).

    Its steps that change text are removed: a space before the text, NFC, BOS and EOS, padding, truncation.
    """

    kind: Literal["file"] = "file"
    path: PathText
    """A tokenizer.json or the folder it is in, such as another run's; relative to the working directory."""
    end_of_document: Annotated[str, Field(min_length=1)] | None = None
    """Token between documents. Null: the folder's eos_token, else a well-known name."""

    def packages(self) -> Iterator[tuple[str, str]]:
        """Yield the library that encodes text."""
        yield "kind", "tokenizers"

    def build(self) -> Tokenizer:
        """Read the tokenizer."""
        from trainer.data.tokenizers.file import read_tokenizer

        return read_tokenizer(Path(self.path), end_of_document=self.end_of_document)


TokenizerConfig = Annotated[
    ByteTokenizerConfig | BPETokenizerConfig | FileTokenizerConfig,
    Field(discriminator="kind"),
    Pluggable("tokenizers", TokenizerOptions),
]
