"""Text files as documents."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.data.records.bad_records import BadRecord, raise_on_bad
from trainer.data.records.base import SourcePart
from trainer.data.records.find_files import TEXT, describe_folders, find_files
from trainer.data.records.text_files import read_document, readable
from trainer.data.sources.base import Document, Source

_PART_BYTES = 16 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class FileGroup(SourcePart):
    """Consecutive files."""

    paths: tuple[Path, ...]


class TextSource(Source):
    """Reads UTF-8 text files, plain, .gz or .zst; each file is one document."""

    has_on_bad_row = True

    def __init__(
        self, path: str | Sequence[str], *, domain: str = "text", weight: float = 1.0, skips_bad_records: bool = False
    ) -> None:
        self._path, self._domain = path, domain
        self.weight, self.skips_bad_records = weight, skips_bad_records

    def files(self) -> list[Path]:
        """Return the files: paths in order, the matches of a glob sorted, each file once."""
        return find_files(self._path, TEXT)

    def folder_notes(self) -> list[str]:
        """Return a line for each folder: which of its files are read and which are not."""
        return describe_folders(self._path, TEXT)

    def parts(self) -> list[FileGroup]:
        """Return groups of files of about 16 MB."""
        parts: list[FileGroup] = []
        group: list[Path] = []
        size_bytes = 0
        for path in self.files():
            with readable(path):
                size_bytes += path.stat().st_size
            group.append(path)
            if size_bytes >= _PART_BYTES:
                parts.append(FileGroup(size_bytes=size_bytes, paths=tuple(group)))
                group, size_bytes = [], 0
        return [*parts, FileGroup(size_bytes=size_bytes, paths=tuple(group))] if group else parts

    def read(self, part: SourcePart) -> Iterator[Document]:
        """Yield the text of each file without a byte order mark; line ends are unchanged."""
        return raise_on_bad(self.entries(part))

    def entries(self, part: SourcePart) -> Iterator[Document | BadRecord]:
        """Yield the text of each file, or its error."""
        assert isinstance(part, FileGroup), "parts() gave it"
        for path in part.paths:
            try:
                text = read_document(path)
            except BadRecord as bad:
                yield bad
            else:
                yield Document(name=str(path), domain=self._domain, text=text)
