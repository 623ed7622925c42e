"""Text files as documents."""

from collections.abc import Iterator
from pathlib import Path

from trainer.data.sources.base import Document, Source
from trainer.data.sources.files import find_files, read_text
from trainer.data.sources.registry import TextSourceConfig


class TextSource(Source):
    """UTF-8 text files, plain or .gz; each file is one document."""

    def __init__(self, config: TextSourceConfig) -> None:
        self.weight = config.weight
        self._config = config

    def files(self) -> list[Path]:
        """Return the files: paths in order, the matches of a glob sorted, each file once.

        Raises:
            DataError: if a path is missing or a folder, or a glob matches no file.
        """
        return find_files(self._config.path)

    def documents(self) -> Iterator[Document]:
        """Yield each file's text, line ends as they are, without a byte order mark.

        Raises:
            DataError: naming the file, if one is unreadable, empty or not UTF-8.
        """
        for path in self.files():
            yield Document(name=str(path), domain=self._config.domain, text=read_text(path))
