"""A checkpoint's manifest: what is in it and where. Read as what it is, a file that anybody may have written.

docs/checkpoint.md describes it for other programs. Imports no torch.
"""

import errno
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import islice
from math import prod
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import ConfigDict, Field, JsonValue, ValidationError

from trainer.atomic_io import NotRegular, open_regular
from trainer.checkpoint.coverage import flaw, missing_names
from trainer.config.base import Config, Problem
from trainer.config.nodes import dotted, shown
from trainer.errors import CheckpointError, ResourceError, TurnoutError

FORMAT = 2
MANIFEST = "manifest.json"
_LARGEST_BYTES = 128 << 20
_MOST_VALUES = 4_000_000  # a million parts of tensors; memory is a multiple of this, whatever the values are
_MOST_SAID = 300  # characters of a message
_MOST = 1 << 53
_GONE = (errno.ENOENT, errno.ENOTDIR, errno.EIO)
"""Error numbers of a file that is missing or on a bad sector; others say nothing about the file."""

DType = Literal["float64", "float32", "bfloat16", "float16", "int64", "int32", "int16", "int8", "uint8", "bool"]
DTYPES: Final[Mapping[DType, tuple[int, str]]] = {
    "float64": (8, "F64"), "float32": (4, "F32"), "bfloat16": (2, "BF16"), "float16": (2, "F16"),
    "int64": (8, "I64"), "int32": (4, "I32"), "int16": (2, "I16"), "int8": (1, "I8"), "uint8": (1, "U8"),
    "bool": (1, "BOOL"),
}  # fmt: skip
"""Bytes of one number, and what safetensors calls it."""

Count = Annotated[int, Field(ge=0, le=_MOST)]
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,99}\.safetensors$")]

TensorName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,299}$")]


class _Entry(Config):
    model_config = ConfigDict(extra="ignore")


class StoredFile(_Entry):
    """One safetensors file."""

    size_bytes: Count
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class StoredSlice(_Entry):
    """Indices start .. start + length - 1 of dimension 0, under the tensor's own name in a file."""

    file: FileName
    start: Count
    length: Count


class StoredTensor(_Entry):
    """One global tensor."""

    dtype: DType
    shape: Annotated[list[Count], Field(max_length=16)]
    is_of_experts: bool = False
    """Dimension 0 counts experts."""
    slices: list[StoredSlice]

    @property
    def length(self) -> int:
        """Indices of dimension 0; 1 for a tensor without dimensions."""
        return self.shape[0] if self.shape else 1

    @property
    def index_bytes(self) -> int:
        """Bytes of one index of dimension 0."""
        return prod(self.shape[1:]) * DTYPES[self.dtype][0]

    def flaws(self) -> Iterator[str]:
        """Yield what is wrong with it by itself."""
        if prod(max(1, size) for size in self.shape) >= 1 << 59:  # also with a 0 among them: no program can address it
            yield f"shape {self.shape} is too large"
        wrong = flaw(((part.start, part.length) for part in self.slices), self.length)
        if wrong is not None:
            yield wrong
        for file, times in Counter(part.file for part in self.slices).items():
            if times > 1:  # they would all be read from the same bytes
                yield f"{times} parts are in {file}, which can hold one"


class Manifest(_Entry):
    """Manifest of a checkpoint."""

    format: Literal[2]
    step: Count
    """Completed steps."""
    run: dict[str, JsonValue]
    """Description of the run: position, config, fingerprints, versions."""
    values: dict[str, int | float | str]
    """Plain values of the engine's state."""
    tensors: dict[TensorName, StoredTensor]
    files: dict[FileName, StoredFile]

    def problems(self) -> Iterator[Problem]:
        """Check that every index of every tensor is there once, in a file that is listed and large enough."""
        yield from islice(self._problems(), 20)

    def _problems(self) -> Iterator[Problem]:
        held_bytes: Counter[str] = Counter()
        for name, tensor in self.tensors.items():
            for wrong in tensor.flaws():
                yield Problem(f"tensors.{name}", wrong)
            for part in tensor.slices:
                held_bytes[part.file] += part.length * tensor.index_bytes
                if part.file not in self.files:
                    yield Problem(f"tensors.{name}", f"{part.file} is not among the files")
        for file, size_bytes in held_bytes.items():
            if file in self.files and size_bytes > self.files[file].size_bytes:
                yield Problem("files", f"{file} has {self.files[file].size_bytes} bytes for {size_bytes} of tensors")
        shapes = {name: tensor.shape for name, tensor in self.tensors.items()}
        experts = [name for name, tensor in self.tensors.items() if tensor.is_of_experts]
        for missing in missing_names(shapes, experts):
            yield Problem("tensors", missing)

    @property
    def sha256(self) -> str:
        """Hash of all that it says."""
        return _hash(self.model_dump(mode="json"))

    @property
    def size_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.size_bytes for file in self.files.values())


class OtherFormat(CheckpointError):
    """A checkpoint is intact, and another version of Turnout wrote it."""


def manifest_text(manifest: Manifest) -> bytes:
    """Return the file's content: the manifest and its own hash.

    Raises:
        CheckpointError: if it is so large that it would not be read again.
    """
    values = manifest.model_dump(mode="json")
    data = json.dumps({**values, "manifest_sha256": _hash(values)}, indent=1).encode()
    if _is_too_large(data):
        raise CheckpointError(
            f"step {manifest.step} not saved: its manifest has {len(data)} bytes, too many to be read"
        )
    return data


def read_manifest(folder: Path) -> Manifest:
    """Return a checkpoint's manifest.

    Raises:
        CheckpointError: if it is missing, damaged or does not describe whole tensors.
        OtherFormat: if another version wrote it.
        ResourceError: if this process cannot read it now.
    """
    path = folder / MANIFEST
    try:
        values = _parse(_read_regular(path, _LARGEST_BYTES))
        stated = values.pop("manifest_sha256")
        version = values["format"]
        is_intact = stated == _hash(values)
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: has no {MANIFEST}, so it is not a checkpoint") from None
    except OSError as error:
        raise unreadable(path, error) from None
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        reason = str(error) if type(error) is ValueError else type(error).__name__
        raise CheckpointError(f"{path}: is damaged ({_one_line(reason)})") from None
    if not is_intact:
        raise CheckpointError(f"{path}: is damaged (its hash does not match its content)")
    if version != FORMAT:
        stated = version if isinstance(version, int | float) else type(version).__name__
        raise OtherFormat(
            f"{folder}: has format {_one_line(str(stated))}, this version reads {FORMAT}; use the other version"
        )
    try:
        return Manifest.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = f"{dotted(first['loc'])}: " if first["loc"] else ""
        raise CheckpointError(f"{path}: is not sound: {_one_line(where + first['msg'])}") from None


def record_flaws(manifest: Manifest) -> Iterator[str]:
    """Yield what does not make sense in what a checkpoint says of its run; a run that goes on needs all of it."""
    run = manifest.run
    for key in ("position", "tokens", "skipped_steps", "skipped_in_a_row"):
        value = run.get(key)
        if type(value) is not int or not 0 <= value <= _MOST:
            yield f"run.{key} is {shown(value)}; it is a number of at least 0"
    for key in ("data_fingerprint", "tokenizer_fingerprint"):
        if not isinstance(run.get(key), str):
            yield f"run.{key} is {shown(run.get(key))}; it is text"
    if not _is_window(run.get("spikes", {})):
        yield f"run.spikes is {shown(run['spikes'])}; it has a list of losses and two counts"
    done = manifest.values.get("optimizer_steps")
    if type(done) is not int or not 0 <= done <= manifest.step:
        yield f"values.optimizer_steps is {shown(done)}; of {manifest.step} steps it is 0 to {manifest.step}"


def _is_window(spikes: JsonValue) -> bool:
    """Tell whether a value can be a window of losses."""
    if not isinstance(spikes, dict):
        return False
    losses = spikes.get("losses", [])
    counts = [spikes.get(key, 0) for key in ("count", "skipped_in_a_row")]
    return (
        isinstance(losses, list)
        and all(type(loss) in (int, float) for loss in losses)
        and all(type(count) is int and 0 <= count <= _MOST for count in counts)
    )


def check_file(folder: Path, name: str, stated: StoredFile, *, with_content: bool = True) -> None:
    """Compare a file with what the manifest says of it.

    Args:
        folder: of the checkpoint.
        name: of the file.
        stated: its size and hash.
        with_content: read all of it and compare the hash as well.

    Raises:
        CheckpointError: naming the file and the difference.
        ResourceError: if this process cannot read it now.
    """
    path = folder / name
    try:
        with os.fdopen(open_regular(path, os.O_RDONLY), "rb") as file:
            size_bytes = os.fstat(file.fileno()).st_size
            if size_bytes != stated.size_bytes:
                raise CheckpointError(f"{path}: is damaged ({size_bytes} bytes instead of {stated.size_bytes})")
            if with_content and hashlib.file_digest(file, "sha256").hexdigest() != stated.sha256:
                raise CheckpointError(f"{path}: is damaged (its SHA-256 is not the one in {MANIFEST})")
    except NotRegular:
        raise CheckpointError(f"{path}: is no regular file") from None
    except OSError as error:
        raise unreadable(path, error) from None


def unreadable(path: Path, error: OSError) -> TurnoutError:
    """Return what a refusal to read says of a file: that it is damaged, or nothing at all."""
    if error.errno in _GONE:
        return CheckpointError(f"{path}: is damaged ({error.strerror})")
    return ResourceError(f"{path}: cannot be read now: {error.strerror}; it may well be sound: mend that and try again")


def _read_regular(path: Path, most_bytes: int) -> bytes:
    """Return a regular file's content; neither a link nor a device nor a flood is followed."""
    try:
        descriptor = open_regular(path, os.O_RDONLY)
    except NotRegular:
        raise ValueError("no regular file") from None
    with os.fdopen(descriptor, "rb") as file:
        if os.fstat(descriptor).st_size > most_bytes:
            raise ValueError("no file of a manifest's size")
        return file.read(most_bytes + 1)


def _parse(data: bytes) -> dict[str, Any]:
    """Return JSON as it must be: no NaN, no key twice, no flood of values."""
    if _is_too_large(data):
        raise ValueError(f"{len(data)} bytes are more than a manifest has")
    return json.loads(data, parse_constant=_refuse_constant, object_pairs_hook=_object)


def _is_too_large(data: bytes) -> bool:
    return len(data) > _LARGEST_BYTES or sum(data.count(mark) for mark in (b",", b"[", b"{")) > _MOST_VALUES


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is no number")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is given twice")
    return found


def _one_line(text: str) -> str:
    """Cut foreign text to what a message can hold, without what would steer a terminal."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text[:_MOST_SAID])


def _hash(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
