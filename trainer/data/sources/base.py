"""Data source interface: named documents, and the files they come from."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.data.records.bad_records import BadRecord, SkippedCounter
from trainer.data.records.base import SourcePart
from trainer.errors import DataError

if TYPE_CHECKING:
    from trainer.data.chat.chat_rows import ChatRow
    from trainer.data.chat.encode_rows import EncodedRow

DOMAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""Full match of a domain's name, which is part of file names and metrics."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One text."""

    name: str
    """Origin for error messages: a relative path, or path:line."""
    domain: str
    text: str
    prompt: str = ""
    """Prompt, read before the text and not learned: none of its tokens is a target."""
    weight: float = 1.0
    """Weight of its targets in the training loss, 0 or more."""
    chat: ChatRow | None = None
    """A conversation, whose `text` is JSON then; token_cache/encode_documents.py encodes it."""
    encoded: EncodedRow | None = None
    """Tokens of the conversation."""

    @property
    def is_whole(self) -> bool:
        """Whether no split divides it."""
        return self.encoded is not None

    @property
    def num_characters(self) -> int:
        """Characters of prompt and text."""
        return len(self.prompt) + len(self.text)


class Source(ABC):
    """Reads documents in a fixed order; independent of tokenizer and split."""

    weight: float
    """Share of the mixture, split evenly over the domains found."""
    rejects_copies: bool = False
    """True if two files with the same content are an error."""
    has_on_bad_row: bool = False
    """True if the source has the option `on_bad_row`."""
    skips_bad_records: bool = False
    """True to skip and count unusable documents instead of raising."""

    @abstractmethod
    def files(self) -> list[Path]:
        """Return every local file that is read, in order; raise DataError if one is missing or a glob matches none."""

    @abstractmethod
    def parts(self) -> Sequence[SourcePart]:
        """Return pieces for parallel processes, in order the whole source, that depend on the files alone."""

    @abstractmethod
    def read(self, part: SourcePart) -> Iterator[Document]:
        """Yield the documents of a part; raise DataError naming the place, if one is unreadable, empty or not UTF-8."""

    def entries(self, part: SourcePart) -> Iterator[Document | BadRecord]:
        """Yield the documents of a part, with a `BadRecord` in place of each unusable one."""
        return self.read(part)

    def folder_notes(self) -> list[str]:
        """Return a line for each folder: which of its files are read and which are not."""
        return []

    def origin(self) -> str:
        """Return the addresses and versions of remote files; empty if all files are local."""
        return ""

    def usable_documents(
        self, part: SourcePart | None, skipped: SkippedCounter, *, first: int = 0
    ) -> Iterator[Document]:
        """Yield the documents of a part (None: of all parts) that can be used, and count the others.

        The `first` usable documents are passed over, with the skipped ones before them. Raises DataError for the first
        unusable document, unless those are skipped.
        """
        number = 0
        for one in self.parts() if part is None else [part]:
            for entry in self.entries(one):
                is_wanted = number >= first
                if not isinstance(entry, BadRecord):
                    number += 1
                    if is_wanted:
                        yield entry
                elif is_wanted or not self.skips_bad_records:
                    self.skip(entry, skipped)

    def skip(self, bad: BadRecord, skipped: SkippedCounter) -> None:
        """Count an unusable record; raise DataError unless those are skipped."""
        if not self.skips_bad_records:
            remedy = ", or skip it: on_bad_row: skip" if self.has_on_bad_row else ""
            raise DataError(f"{bad}{remedy}") from bad
        skipped.add(bad)

    def documents(self) -> Iterator[Document]:
        """Yield all usable documents, part by part."""
        return self.usable_documents(None, SkippedCounter())
