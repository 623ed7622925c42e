"""Every tokenizer's options, and the union of them that `data.tokenizer` accepts. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from trainer.config.base import Config

if TYPE_CHECKING:
    from trainer.data.tokenizers.base import Tokenizer


class ByteTokenizerConfig(Config):
    """One token per UTF-8 byte; 0xFF, which UTF-8 never uses, ends a document."""

    kind: Literal["byte"] = "byte"

    def build(self) -> Tokenizer:
        """Make the tokenizer."""
        from trainer.data.tokenizers.byte import ByteTokenizer

        return ByteTokenizer()


TokenizerConfig = ByteTokenizerConfig
