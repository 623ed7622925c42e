"""Files that a source is read from, and whether they have changed."""

import hashlib
from collections.abc import Collection
from pathlib import Path
from typing import Self

from trainer.config.base import Config
from trainer.data.records.text_files import readable
from trainer.data.token_cache.signed_json import hash_of
from trainer.errors import DataError


class FileState(Config):
    """State of an input file: size and time for a quick comparison, and the hash for a reliable one."""

    path: str
    size_bytes: int
    mtime_ns: int
    sha256: str | None = None

    @classmethod
    def of(cls, path: Path) -> Self:
        """Return the state of a file without its hash; raise DataError if the file is gone."""
        with readable(path):
            status = path.stat()
        return cls(path=str(path), size_bytes=status.st_size, mtime_ns=status.st_mtime_ns)

    def hashed(self) -> Self:
        """Return the state with the hash; raise DataError if the file cannot be read."""
        with readable(Path(self.path)), Path(self.path).open("rb") as file:
            return self.model_copy(update={"sha256": hashlib.file_digest(file, "sha256").hexdigest()})


class Content(Config):
    """Inputs that a source is read from."""

    origin: str
    """Addresses and versions of remote files."""
    files: list[FileState]

    def quick_hash(self) -> str:
        """Return a short hash of what is known without reading: addresses, paths, sizes and times."""
        return hash_of([self.origin, *([file.path, file.size_bytes, file.mtime_ns] for file in self.files)])[:16]

    def hashed(self) -> Self:
        """Return the content with the hashes of all files."""
        return self.model_copy(update={"files": [file.hashed() for file in self.files]})

    def refuse_changes(self) -> None:
        """Raise DataError naming the first file that has changed since the content was listed."""
        for file in self.files:
            if FileState.of(Path(file.path)) != file:
                raise DataError(f"{file.path}: changed during reading; files must not change meanwhile; start again")

    def refuse_copies(self, *, unused: Collection[str]) -> None:
        """Raise DataError naming two files of hashed content that are equal, unless one is unused."""
        first: dict[str, str] = {}
        for file in self.files:
            if file.path in unused:
                continue
            assert file.sha256 is not None, "it was hashed"
            if file.sha256 in first:
                raise DataError(
                    f"{file.path}: is a copy of {first[file.sha256]}; each record is read once; remove one of them"
                )
            first[file.sha256] = file.path
