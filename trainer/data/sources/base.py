"""What a data source is: named documents, and the files they come from."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.data.rows.base import Part


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One text."""

    name: str
    """Where it comes from, for error messages: a relative path, or path:line."""
    domain: str
    text: str
    """What is learned."""
    prompt: str = ""
    """What is read before it and not learned: no token of it is a target."""


class Source(ABC):
    """Reads documents in a fixed order. Knows nothing of tokens or splits."""

    weight: float
    """Share of the mixture, split evenly over the domains found."""
    rejects_copies: bool = False
    """Whether two files with the same content are a mistake."""

    @abstractmethod
    def files(self) -> list[Path]:
        """Return every local file that is read, in order.

        Raises:
            DataError: if a file is missing or a glob matches none.
        """

    @abstractmethod
    def parts(self) -> Sequence[Part]:
        """Return pieces that processes can read side by side; in order they are the whole source.

        What the pieces are depends on the files alone.

        Raises:
            DataError: if what is to be read is not there.
        """

    @abstractmethod
    def read(self, part: Part) -> Iterator[Document]:
        """Yield the documents of one of this source's parts.

        Raises:
            DataError: naming the file (and line), if one is unreadable, empty or not UTF-8.
        """

    def origin(self) -> str:
        """Return what is read and is no local file: its addresses and their versions. Empty if all files are local."""
        return ""

    def documents(self) -> Iterator[Document]:
        """Yield all documents, part by part.

        Raises:
            DataError: as `parts` and `read`.
        """
        for part in self.parts():
            yield from self.read(part)
