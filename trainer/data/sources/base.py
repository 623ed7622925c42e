"""What a data source is: named documents, and the files they come from."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One text."""

    name: str
    """Where it comes from, for error messages: a relative path, or path:line."""
    domain: str
    text: str


class Source(ABC):
    """Reads documents in a fixed order. Knows nothing of tokens or splits."""

    weight: float
    """Share of the mixture, split evenly over the domains found."""

    @abstractmethod
    def files(self) -> list[Path]:
        """Return every file that is read, in order.

        Raises:
            DataError: if a file is missing or a glob matches none.
        """

    @abstractmethod
    def documents(self) -> Iterator[Document]:
        """Yield the documents, files in order.

        Raises:
            DataError: naming the file (and line), if one is unreadable, empty or not UTF-8.
        """
