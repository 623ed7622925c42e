"""JSON files of the cache, signed with a hash of their content and of the folder they describe.

A file with flipped bits, or one moved to another folder, is detected.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, TypeVar

from trainer.config.base import Config

_HASH = "record_sha256"
_Content = TypeVar("_Content", bound=Config)


def signed_json(content: Config, *, of: str) -> str:
    """Return the signed JSON of `content`, which describes the folder `of`."""
    values = content.model_dump(mode="json")
    return json.dumps({**values, _HASH: hash_of([of, values])}, indent=1)


def read_signed(path: Path, kind: type[_Content], *, of: str) -> _Content:
    """Read a signed file; files of older versions have no hash and are not checked.

    Raises OSError if it cannot be read, and ValueError if it is damaged or describes another folder.
    """
    values = json.loads(path.read_bytes())
    if isinstance(values, dict):
        stated = values.pop(_HASH, None)
        if stated is not None and stated != hash_of([of, values]):
            raise ValueError(f"{path} is damaged")
    return kind.model_validate(values)


def hash_of(value: Any) -> str:
    """Return the SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode("utf-8")).hexdigest()
