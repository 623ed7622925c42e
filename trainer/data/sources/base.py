"""Data source interface: named documents, and the files they come from."""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.data.records.bad_records import BadRecord, SkippedCounter
from trainer.data.records.base import SourcePart
from trainer.errors import DataError

DOMAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""Full match of a domain's name, which is part of file names and metrics."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One text."""

    name: str
    """Origin for error messages: a relative path, or path:line."""
    domain: str
    text: str
    """Text to learn."""
    prompt: str = ""
    """Prompt, read before the text and not learned: none of its tokens is a target."""


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
        """Return every local file that is read, in order.

        Raises:
            DataError: if a file is missing or a glob matches none.
        """

    @abstractmethod
    def parts(self) -> Sequence[SourcePart]:
        """Return pieces that processes can read in parallel; concatenated in order they are the whole source.

        They depend on the files alone.

        Raises:
            DataError: if the data is missing.
        """

    @abstractmethod
    def read(self, part: SourcePart) -> Iterator[Document]:
        """Yield the documents of one of this source's parts.

        Raises:
            DataError: naming the file (and line), if one is unreadable, empty or not UTF-8.
        """

    def entries(self, part: SourcePart) -> Iterator[Document | BadRecord]:
        """Yield the documents of a part, with a `BadRecord` in place of each unusable one.

        Raises:
            DataError: if a file cannot be read to its end.
        """
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
        """Yield the documents of a part that can be used.

        Args:
            part: None for all parts, one after the other.
            skipped: counts the documents that are skipped.
            first: number of usable documents to pass over, together with the skipped ones before them.

        Raises:
            DataError: as `parts` and `read`; also for the first unusable document, unless those are skipped.
        """
        number = 0
        for one in self.parts() if part is None else [part]:
            for entry in self.entries(one):
                is_wanted = number >= first
                if not isinstance(entry, BadRecord):
                    number += 1
                    if is_wanted:
                        yield entry
                elif not self.skips_bad_records:
                    raise self._error(entry) from entry
                elif is_wanted:
                    skipped.add(entry)

    def _error(self, record: BadRecord) -> DataError:
        return DataError(f"{record}, or skip it: on_bad_row: skip") if self.has_on_bad_row else record

    def documents(self) -> Iterator[Document]:
        """Yield all usable documents, part by part; raise DataError as `usable_documents`."""
        return self.usable_documents(None, SkippedCounter())
