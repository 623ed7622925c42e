"""Text files as documents."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from trainer.data.records.bad_records import BadRow, usable
from trainer.data.records.base import SourcePart
from trainer.data.sources.base import Document, Source
from trainer.data.sources.files import read_text, readable
from trainer.data.sources.finding import TEXT, find_files, taken_from_folders
from trainer.data.sources.registry import TextSourceConfig

_PART_BYTES = 16 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class TextFiles(SourcePart):
    """Neighbouring files."""

    paths: tuple[Path, ...]


class TextSource(Source):
    """UTF-8 text files, plain, .gz or .zst; each file is one document."""

    has_on_bad_row = True

    def __init__(self, config: TextSourceConfig) -> None:
        self.weight = config.weight
        self.skips_bad_rows = config.on_bad_row == "skip"
        self._config = config

    def files(self) -> list[Path]:
        """Return the files: paths in order, the matches of a glob sorted, each file once.

        Raises:
            DataError: if there are none where a path, glob or folder says.
        """
        return find_files(self._config.path, TEXT)

    def taken(self) -> list[str]:
        """Return a line for each folder that files are taken from."""
        return taken_from_folders(self._config.path, TEXT)

    def parts(self) -> list[TextFiles]:
        """Return groups of files of about 16 MB.

        Raises:
            DataError: if there are none where a path, glob or folder says.
        """
        parts: list[TextFiles] = []
        group: list[Path] = []
        size_bytes = 0
        for path in self.files():
            with readable(path):
                size_bytes += path.stat().st_size
            group.append(path)
            if size_bytes >= _PART_BYTES:
                parts.append(TextFiles(size_bytes=size_bytes, paths=tuple(group)))
                group, size_bytes = [], 0
        return [*parts, TextFiles(size_bytes=size_bytes, paths=tuple(group))] if group else parts

    def read(self, part: SourcePart) -> Iterator[Document]:
        """Yield each file's text, line ends as they are, without a byte order mark.

        Raises:
            DataError: naming the file, if one is unreadable, empty or not UTF-8.
        """
        return usable(self.entries(part))

    def entries(self, part: SourcePart) -> Iterator[Document | BadRow]:
        """Yield each file's text, or what is wrong with it.

        Raises:
            DataError: naming the file, if the system does not let it be read.
        """
        assert isinstance(part, TextFiles), "parts() gave it"
        for path in part.paths:
            yield self._document(path)

    def _document(self, path: Path) -> Document | BadRow:
        try:
            return Document(name=str(path), domain=self._config.domain, text=read_text(path))
        except BadRow as bad:
            return bad
