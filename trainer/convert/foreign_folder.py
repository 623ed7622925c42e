"""A published folder as untrusted input: regular files in it, bounded JSON, no name that leads elsewhere. No torch."""

import json
import os
import stat
from pathlib import Path
from typing import Any, Final

from trainer.atomic_io import NotRegular, open_regular
from trainer.config.nodes import shown, shown_path
from trainer.errors import DataError

CONFIG: Final = "config.json"
_MAX_CONFIG_BYTES: Final = 1 << 20


class ForeignFolder:
    """A folder with a published model."""

    def __init__(self, path: Path) -> None:
        """Check that it is a folder.

        Raises:
            DataError: if it is not.
        """
        self.path = path
        if not path.is_dir():
            raise DataError(f"{shown_path(path)}: is not a folder; give that of a published model, with its {CONFIG}")

    def has(self, name: str) -> bool:
        """Return whether there is such an entry, whatever it is."""
        return os.path.lexists(self.path / name)

    def open(self, name: str) -> int:
        """Open a regular file of the folder for reading; return its descriptor.

        A link may lead to a file of the folder, or of the hub's own cache around it, which keeps files by their hash.

        Raises:
            DataError: if it is missing, leads elsewhere or cannot be read.
        """
        path = self.path / name
        where = shown_path(path)
        try:
            real, root = path.resolve(strict=True), self.path.resolve()
            allowed = [root, *([root.parents[1] / "blobs"] if root.parent.name == "snapshots" else [])]
            if not any(real.is_relative_to(folder) for folder in allowed):
                raise DataError(f"{where}: is a link out of the folder, to {shown_path(real)}; copy the file into it")
            return open_regular(real, os.O_RDONLY)
        except NotRegular:
            raise DataError(f"{where}: is not a regular file; a published model consists of files") from None
        except FileNotFoundError:
            raise DataError(f"{where}: no such file; download it again") from None
        except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
            reason = error.strerror if isinstance(error, OSError) else "links in a circle"
            raise DataError(f"{where}: cannot be read ({reason}); make it readable") from None

    def bytes_of(self, name: str, *, at_most: int) -> bytes:
        """Return the content of a small file.

        Raises:
            DataError: as `open`, and if it has more than `at_most` bytes.
        """
        with os.fdopen(self.open(name), "rb") as file:
            if os.fstat(file.fileno()).st_size > at_most:
                raise DataError(
                    f"{shown_path(self.path / name)}: has {os.fstat(file.fileno()).st_size} bytes, and at most "
                    f"{at_most} are read; it is not what its name says: download it again"
                )
            return file.read(at_most)

    def json(self, name: str, *, at_most: int = _MAX_CONFIG_BYTES) -> dict[str, Any]:
        """Return the JSON object in a file; a key that is given twice, or NaN, is refused.

        Raises:
            DataError: as `bytes_of`, and if it is not such an object.
        """
        text = self.bytes_of(name, at_most=at_most)
        return parse_object(text, str(self.path / name))


def parse_object(text: bytes, where: str) -> dict[str, Any]:
    """Parse an untrusted JSON object; messages begin with `where`.

    Raises:
        DataError: if it is anything else, has a key twice or a number that is not finite.
    """
    try:
        values = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_object)
        if isinstance(values, dict):
            return values
        reason = "it holds no object"
    except RecursionError:
        reason = "it is nested too deeply"
    except ValueError as error:  # of JSON, and of UTF-8
        reason = str(error).splitlines()[0][:200]
    raise DataError(f"{shown_path(where)}: is not the JSON that it should be ({reason}); download it again")


def is_file_name(name: object) -> bool:
    """Return whether text names a file in the same folder, and nothing else."""
    return isinstance(name, str) and 0 < len(name) <= 255 and name.isprintable() and not {"/", "\\"} & {*name}


def size_of(descriptor: int) -> int:
    """Return the size of an open file in bytes."""
    return os.stat(descriptor)[stat.ST_SIZE]


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is not a number")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1) if len(names) < 1000 else "a key"
        raise ValueError(f"{shown(twice)} is given twice")
    return values
