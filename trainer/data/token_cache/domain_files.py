"""The token files of one domain, DOMAIN.train and DOMAIN.validation, and their documents."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainer.config.base import Config
from trainer.data.sources.base import Document
from trainer.data.token_cache.splits import Side
from trainer.data.token_cache.token_files import TokenFile, TokenFileInfo, is_intact, open_token_file
from trainer.data.token_cache.token_writer import TokenWriter
from trainer.data.tokenizers.base import Tokenizer

SIDES: tuple[Side, Side] = ("train", "validation")


class DomainInfo(Config):
    """Manifest entry of one domain."""

    name: str
    is_cut: bool
    """Split by its tail, not by the hashes of its documents."""
    num_documents: int
    """Number of documents read; one that the tail split divided counts once."""
    is_resplit: bool = False
    """The hash left one side empty, so the documents of one text have changed sides (join_parts.py)."""
    is_chat: bool = False
    """Its documents are conversations, which no split divides."""
    train: TokenFileInfo
    validation: TokenFileInfo

    def side(self, side: Side) -> TokenFileInfo:
        """Return the entry of one side."""
        return self.train if side == "train" else self.validation

    def content(self) -> list[str]:
        """Return the hashes of both sides: equal exactly if the content is."""
        return [*self.train.content(), *self.validation.content()]


@contextmanager
def write_sides(folder: Path, prefix: str, tokenizer: Tokenizer) -> Iterator[dict[Side, TokenWriter]]:
    """Open writers for both sides of a domain, whose files have this prefix."""
    sizes = {"vocab_size": tokenizer.vocab_size, "end_of_document": tokenizer.end_of_document}
    with TokenWriter(folder, f"{prefix}train", **sizes) as a, TokenWriter(folder, f"{prefix}validation", **sizes) as b:
        yield {"train": a, "validation": b}


def open_side(folder: Path, domain: DomainInfo, side: Side, *, vocab_size: int) -> TokenFile:
    """Map one side of a domain into memory; raise DataError naming the file, if one is damaged."""
    return open_token_file(folder, f"{domain.name}.{side}", domain.side(side), vocab_size=vocab_size)


def is_domain_intact(folder: Path, domain: DomainInfo, *, vocab_size: int, verify: bool = False) -> bool:
    """Return whether all files of a domain exist in the expected size; `verify` compares their hashes too."""
    return all(
        is_intact(folder, f"{domain.name}.{side}", domain.side(side), vocab_size=vocab_size, verify=verify)
        for side in SIDES
    )


def write_document(writer: TokenWriter, tokenizer: Tokenizer, document: Document) -> int:
    """Append a document; return its bytes of text."""
    if document.encoded is not None:
        return _write_encoded(writer, tokenizer, *document.encoded, weight=document.weight)
    tokens = tokenizer.encode(document.text)
    num_prompt_tokens, num_bytes = 0, len(document.text.encode())
    if document.prompt:
        # Tokenised separately, so that no token spans its end: at generation time, the prompt is all there is.
        prompt_tokens = tokenizer.encode(document.prompt)
        tokens = np.concatenate([prompt_tokens, tokens])
        num_prompt_tokens = len(prompt_tokens)
        num_bytes += len(document.prompt.encode())
    writer.write(tokens, num_bytes=num_bytes, num_prompt_tokens=num_prompt_tokens, weight=document.weight)
    return num_bytes


def copy_document(writer: TokenWriter, tokenizer: Tokenizer, file: TokenFile, index: int) -> None:
    """Append a document of another token file of the same tokenizer."""
    _write_encoded(writer, tokenizer, *file.document(index), weight=file.weight(index))


def _write_encoded(
    writer: TokenWriter,
    tokenizer: Tokenizer,
    tokens: NDArray[np.integer],
    is_learned: NDArray[np.bool_],
    *,
    weight: float,
) -> int:
    """Append a document of which each token is learned or not; return its bytes of text."""
    num_bytes = int(tokenizer.token_bytes()[tokens].sum())
    writer.write(tokens, num_bytes=num_bytes, is_learned=is_learned, weight=weight)
    return num_bytes
