"""Records of the cache: JSON with a hash of itself and of what it is a record of.

So a record whose bits have changed, or that has got into another folder, is no record.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, TypeVar

from trainer.config.base import Config

_HASH = "record_sha256"
_Record = TypeVar("_Record", bound=Config)


def record_text(record: Config, *, of: str) -> str:
    """Return the content of a file that holds a record of `of`."""
    values = record.model_dump(mode="json")
    return json.dumps({**values, _HASH: hash_of([of, values])}, indent=1)


def read_record(path: Path, kind: type[_Record], *, of: str) -> _Record:
    """Return a record; those of older versions have no hash, and are taken as they are.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is damaged, or of something else.
    """
    values = json.loads(path.read_bytes())
    if isinstance(values, dict):
        stated = values.pop(_HASH, None)
        if stated is not None and stated != hash_of([of, values]):
            raise ValueError(f"{path} is damaged")
    return kind.model_validate(values)


def hash_of(value: Any) -> str:
    """Return the SHA-256 of a value of JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode("utf-8")).hexdigest()
