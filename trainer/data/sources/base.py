"""Data source interface: named documents, and the files they come from."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.data.records.bad_records import BadRow, SkippedCounter
from trainer.data.records.base import SourcePart
from trainer.errors import DataError


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One text."""

    name: str
    """Origin for error messages: a relative path, or path:line."""
    domain: str
    text: str
    """Text to learn."""
    prompt: str = ""
    """Prompt, read before the text and not learned: no token of it is a target."""


class Source(ABC):
    """Reads documents in a fixed order. Knows nothing of tokens or splits."""

    weight: float
    """Share of the mixture, split evenly over the domains found."""
    rejects_copies: bool = False
    """True if two files with the same content are a mistake."""
    has_on_bad_row: bool = False
    """True if its options say what becomes of a document that cannot be used."""
    skips_bad_rows: bool = False
    """True to leave out and count documents that cannot be used, instead of an error."""

    @abstractmethod
    def files(self) -> list[Path]:
        """Return every local file that is read, in order.

        Raises:
            DataError: if a file is missing or a glob matches none.
        """

    @abstractmethod
    def parts(self) -> Sequence[SourcePart]:
        """Return pieces that processes can read side by side; in order they are the whole source.

        What the pieces are depends on the files alone.

        Raises:
            DataError: if what is to be read is not there.
        """

    @abstractmethod
    def read(self, part: SourcePart) -> Iterator[Document]:
        """Yield the documents of one of this source's parts.

        Raises:
            DataError: naming the file (and line), if one is unreadable, empty or not UTF-8.
        """

    def entries(self, part: SourcePart) -> Iterator[Document | BadRow]:
        """Yield the documents of a part, and in place of those that cannot be used what is wrong with them.

        Raises:
            DataError: if a file cannot be read to its end.
        """
        return self.read(part)

    def taken(self) -> list[str]:
        """Return what is taken where a folder does not say it: a line for each."""
        return []

    def origin(self) -> str:
        """Return what is read and is no local file: its addresses and their versions. Empty if all files are local."""
        return ""

    def usable(self, part: SourcePart | None, skipped: SkippedCounter, *, first: int = 0) -> Iterator[Document]:
        """Yield the documents of a part that are to be learned.

        Args:
            part: None: all parts, one after the other.
            skipped: counts those that are left out.
            first: documents to pass over, with what is left out before them.

        Raises:
            DataError: as `parts` and `read`; of what cannot be used, if it is not to be left out.
        """
        number = 0
        for one in self.parts() if part is None else [part]:
            for entry in self.entries(one):
                is_wanted = number >= first
                if not isinstance(entry, BadRow):
                    number += 1
                    if is_wanted:
                        yield entry
                elif not self.skips_bad_rows:
                    raise self._refusal(entry) from entry
                elif is_wanted:
                    skipped.add(entry)

    def _refusal(self, row: BadRow) -> DataError:
        """Return the error for a document that cannot be used and is not to be left out."""
        return DataError(f"{row}, or go on without it: on_bad_row: skip") if self.has_on_bad_row else row

    def documents(self) -> Iterator[Document]:
        """Yield all documents that are to be learned, part by part.

        Raises:
            DataError: as `usable`.
        """
        return self.usable(None, SkippedCounter())
