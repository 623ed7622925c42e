"""Text files as documents."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from trainer.data.rows.base import Part
from trainer.data.sources.base import Document, Source
from trainer.data.sources.files import find_files, read_text, readable
from trainer.data.sources.registry import TextSourceConfig

_PART_BYTES = 16 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Files(Part):
    """Neighbouring files."""

    paths: tuple[Path, ...]


class TextSource(Source):
    """UTF-8 text files, plain, .gz or .zst; each file is one document."""

    def __init__(self, config: TextSourceConfig) -> None:
        self.weight = config.weight
        self._config = config

    def files(self) -> list[Path]:
        """Return the files: paths in order, the matches of a glob sorted, each file once.

        Raises:
            DataError: if a path is missing or a folder, or a glob matches no file.
        """
        return find_files(self._config.path)

    def parts(self) -> list[Files]:
        """Return groups of files of about 16 MB.

        Raises:
            DataError: if a path is missing or a folder, or a glob matches no file.
        """
        parts: list[Files] = []
        group: list[Path] = []
        size_bytes = 0
        for path in self.files():
            with readable(path):
                size_bytes += path.stat().st_size
            group.append(path)
            if size_bytes >= _PART_BYTES:
                parts.append(Files(size_bytes=size_bytes, paths=tuple(group)))
                group, size_bytes = [], 0
        return [*parts, Files(size_bytes=size_bytes, paths=tuple(group))] if group else parts

    def read(self, part: Part) -> Iterator[Document]:
        """Yield each file's text, line ends as they are, without a byte order mark.

        Raises:
            DataError: naming the file, if one is unreadable, empty or not UTF-8.
        """
        assert isinstance(part, Files), "parts() gave it"
        for path in part.paths:
            yield Document(name=str(path), domain=self._config.domain, text=read_text(path))
