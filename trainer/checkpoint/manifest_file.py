"""Read and write manifest.json as untrusted JSON: bounded in size, hashed, no link or device followed. No torch."""

import json
import os
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from trainer.atomic_io import NotRegular, open_regular
from trainer.checkpoint.file_integrity import read_error
from trainer.checkpoint.manifest import FORMAT, MANIFEST, Manifest, UnsupportedFormat, hash_values
from trainer.config.nodes import dotted
from trainer.errors import CheckpointError

_MAX_BYTES = 128 << 20
_MAX_VALUES = 4_000_000  # about a million slices; parsed JSON takes a multiple of this in memory
_MAX_SHOWN = 300  # characters of a message


def manifest_text(manifest: Manifest) -> bytes:
    """Return the file's content: the manifest and its own hash.

    Raises:
        CheckpointError: if it is larger than `read_manifest` accepts.
    """
    values = manifest.model_dump(mode="json")
    data = json.dumps({**values, "manifest_sha256": hash_values(values)}, indent=1).encode()
    if _is_too_large(data):
        raise CheckpointError(
            f"step {manifest.step} not saved: its manifest has {len(data)} bytes, too many to be read"
        )
    return data


def read_manifest(folder: Path) -> Manifest:
    """Return a checkpoint's manifest.

    Raises:
        CheckpointError: if it is missing, damaged or does not describe whole tensors.
        UnsupportedFormat: if another version wrote it.
        ResourceError: if this process cannot read it now.
    """
    path = folder / MANIFEST
    try:
        values = _parse(_read(path))
        recorded = values.pop("manifest_sha256")
        version, is_intact = values["format"], recorded == hash_values(values)
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: has no {MANIFEST}, so it is not a checkpoint") from None
    except OSError as error:
        raise read_error(path, error) from None
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        reason = str(error) if type(error) is ValueError else type(error).__name__
        raise CheckpointError(f"{path}: is damaged ({_printable(reason)})") from None
    if not is_intact:
        raise CheckpointError(f"{path}: is damaged (its hash does not match its content)")
    if version != FORMAT:
        name = version if isinstance(version, int | float) else type(version).__name__
        raise UnsupportedFormat(
            f"{folder}: has format {_printable(str(name))}, this version reads {FORMAT}; use the version that wrote it"
        )
    try:
        return Manifest.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = f"{dotted(first['loc'])}: " if first["loc"] else ""
        raise CheckpointError(f"{path}: is invalid: {_printable(where + first['msg'])}") from None


def _read(path: Path) -> bytes:
    try:
        with os.fdopen(open_regular(path, os.O_RDONLY), "rb") as file:
            return file.read(_MAX_BYTES + 1)
    except NotRegular:
        raise ValueError("not a regular file") from None


def _parse(data: bytes) -> dict[str, Any]:
    """Parse JSON; refuse NaN, duplicate keys and more values than a manifest can have."""
    if _is_too_large(data):
        raise ValueError(f"{len(data)} bytes are more than a manifest has")
    return json.loads(data, parse_constant=_refuse_constant, object_pairs_hook=_object)


def _is_too_large(data: bytes) -> bool:
    return len(data) > _MAX_BYTES or sum(data.count(mark) for mark in (b",", b"[", b"{")) > _MAX_VALUES


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is not a number")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a key is given twice")
    return values


def _printable(text: str) -> str:
    """Shorten untrusted text for a message and replace characters that would control a terminal."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text[:_MAX_SHOWN])
