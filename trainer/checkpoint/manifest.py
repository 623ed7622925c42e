"""Manifest of a checkpoint: its tensors, the files that hold them and a record of the run. Imports no torch.

docs/checkpoint.md describes the format for other programs. Every value is checked, since anyone may have written it.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import islice
from math import prod
from typing import Annotated, Any, Final, Literal, Self

from pydantic import ConfigDict, Field, JsonValue, PrivateAttr

from trainer.checkpoint.coverage import is_average, is_moment, missing_moments, partition_error, weight_of
from trainer.config.base import Config, Problem
from trainer.config.nodes import shown
from trainer.errors import CheckpointError

FORMAT = 2
MANIFEST = "manifest.json"
_MAX_COUNT = 1 << 53  # exact in every JSON reader
_MAX_PROBLEMS = 20

DType = Literal["float64", "float32", "bfloat16", "float16", "int64", "int32", "int16", "int8", "uint8", "bool"]
DTYPES: Final[Mapping[DType, tuple[int, str]]] = {
    "float64": (8, "F64"), "float32": (4, "F32"), "bfloat16": (2, "BF16"), "float16": (2, "F16"),
    "int64": (8, "I64"), "int32": (4, "I32"), "int16": (2, "I16"), "int8": (1, "I8"), "uint8": (1, "U8"),
    "bool": (1, "BOOL"),
}  # fmt: skip
"""Bytes per element, and the name that safetensors uses."""

Count = Annotated[int, Field(ge=0, le=_MAX_COUNT)]
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,99}\.safetensors$")]
TensorName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,299}$")]


class _Entry(Config):
    model_config = ConfigDict(extra="ignore")


class StoredFile(_Entry):
    """One safetensors file."""

    size_bytes: Count
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class StoredSlice(_Entry):
    """Indices start .. start + length - 1 of dimension 0, stored in a file under the tensor's own name."""

    file: FileName
    start: Count
    length: Count


class StoredTensor(_Entry):
    """One global tensor."""

    dtype: DType
    shape: Annotated[list[Count], Field(max_length=16)]
    is_of_experts: bool = False
    """Dimension 0 counts experts."""
    is_frozen: bool = False
    """A weight that did not learn, so that it has no moments."""
    slices: list[StoredSlice]
    _kept_as: str | None = PrivateAttr(default=None)

    def kept_as(self, name: str) -> str:
        """Return the name in the files of the tensor that is called `name` here."""
        return name if self._kept_as is None else self._kept_as

    def in_place_of(self, weight: "StoredTensor", *, name: str) -> "StoredTensor":
        """Return this tensor, `name` in the files, to be read as another one."""
        read = self.model_copy(update={"is_frozen": weight.is_frozen})
        read._kept_as = name
        return read

    @property
    def length(self) -> int:
        """Size of dimension 0; 1 for a scalar tensor."""
        return self.shape[0] if self.shape else 1

    @property
    def index_bytes(self) -> int:
        """Bytes of one index of dimension 0."""
        return prod(self.shape[1:]) * DTYPES[self.dtype][0]

    def defects(self) -> Iterator[str]:
        """Yield the problems of this tensor alone."""
        if prod(max(1, size) for size in self.shape) >= 1 << 59:  # not addressable, even if one size is 0
            yield f"shape {self.shape} is too large"
        error = partition_error(((part.start, part.length) for part in self.slices), self.length)
        if error is not None:
            yield error
        for file, num_parts in Counter(part.file for part in self.slices).items():
            if num_parts > 1:  # all of them would be read from the same bytes
                yield f"{num_parts} parts are in {file}, which can hold one"


class Manifest(_Entry):
    """Manifest of a checkpoint."""

    format: Literal[2]
    step: Count
    run: dict[str, JsonValue]
    """Record of the run: position, config, fingerprints, versions."""
    values: dict[str, int | float | str]
    """Scalars of the engine's state."""
    tensors: dict[TensorName, StoredTensor]
    files: dict[FileName, StoredFile]

    def problems(self) -> Iterator[Problem]:
        """Check that every index of every tensor is stored once, in a listed file that is large enough."""
        yield from islice(self._problems(), _MAX_PROBLEMS)

    def _problems(self) -> Iterator[Problem]:
        stored_bytes: Counter[str] = Counter()
        for name, tensor in self.tensors.items():
            for defect in tensor.defects():
                yield Problem(f"tensors.{name}", defect)
            for part in tensor.slices:
                stored_bytes[part.file] += part.length * tensor.index_bytes
                if part.file not in self.files:
                    yield Problem(f"tensors.{name}", f"{part.file} is not among the files")
        for file, size_bytes in stored_bytes.items():
            if file in self.files and size_bytes > self.files[file].size_bytes:
                yield Problem("files", f"{file} has {self.files[file].size_bytes} bytes for {size_bytes} of tensors")
        shapes = {name: tensor.shape for name, tensor in self.tensors.items()}
        experts = [name for name, tensor in self.tensors.items() if tensor.is_of_experts and not tensor.is_frozen]
        if not self.has_moments:
            return
        for missing in missing_moments(shapes, experts):
            yield Problem("tensors", missing)

    def averaged(self) -> Self | None:
        """Return this manifest with moving averages in the place of their weights; None if it has not all of them.

        What did not learn and buffers have none, and stay.
        """
        averages = {weight_of(name): name for name in self.tensors if is_average(name)}
        learning = {weight_of(name) for name in self.tensors if is_moment(name)}
        if not averages or not learning <= averages.keys() <= self.tensors.keys():
            return None
        tensors = {name: stored for name, stored in self.tensors.items() if not is_average(name)}
        for weight, name in averages.items():
            tensors[weight] = self.tensors[name].in_place_of(tensors[weight], name=name)
        return self.model_copy(update={"tensors": tensors})

    @property
    def has_moments(self) -> bool:
        """False at step 0 of weights that come from elsewhere: all moments are zero, and none is stored."""
        return self.step > 0 or any(map(is_moment, self.tensors))

    @property
    def sha256(self) -> str:
        """Hash of the whole manifest."""
        return hash_values(self.model_dump(mode="json"))

    @property
    def size_bytes(self) -> int:
        """Total size of the files."""
        return sum(file.size_bytes for file in self.files.values())


class UnsupportedFormat(CheckpointError):
    """The checkpoint is intact, but another version of Turnout wrote it."""


def hash_values(values: Mapping[str, Any]) -> str:
    """Return the SHA-256 of JSON values, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def run_record_problems(manifest: Manifest) -> Iterator[str]:
    """Yield the problems of a manifest's record of its run; a run needs all of the record to resume."""
    run = manifest.run
    for key in ("position", "tokens", "skipped_steps", "skipped_in_a_row"):
        if not _is_count(run.get(key)):
            yield f"run.{key} is {shown(run.get(key))}; it is a number of at least 0"
    for key in ("data_fingerprint", "tokenizer_fingerprint"):
        has_read_nothing = key == "data_fingerprint" and manifest.step == 0 and run.get(key, "") is None
        if not isinstance(run.get(key), str) and not has_read_nothing:
            yield f"run.{key} is {shown(run.get(key))}; it is text"
    if not _is_spike_window(run.get("spikes", {})):
        yield f"run.spikes is {shown(run['spikes'])}; it has a list of losses and two counts"
    if not _is_count(updates := manifest.values.get("ema.updates", 0)):
        yield f"values.ema.updates is {shown(updates)}; it is a number of at least 0"
    done = manifest.values.get("optimizer_steps")
    taken_over = manifest.run.get("optimizer_steps_taken_over", 0)  # by `init_from`, with moments
    if type(taken_over) is not int or not _is_count(taken_over):
        yield f"run.optimizer_steps_taken_over is {shown(taken_over)}; it is a number of at least 0"
        return
    most = manifest.step + taken_over
    if type(done) is not int or not 0 <= done <= most:
        yield f"values.optimizer_steps is {shown(done)}; of {most} steps it is 0 to {most}"


def recorded_layout(manifest: Manifest) -> dict[str, int | str]:
    """Return the layout of the ranks that wrote a checkpoint, without keys that are missing or malformed."""
    layout = manifest.run.get("layout")
    if not isinstance(layout, dict):
        return {}
    keys = "world_size", "ep_size", "cp_size", "tp_size", "pp_size", "data", "engine", "placement"
    found = {key: layout.get(key) for key in keys}
    texts = {key: shown(value)[1:-1] for key, value in found.items() if isinstance(value, str)}
    return texts | {key: value for key, value in found.items() if type(value) is int}


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value <= _MAX_COUNT


def _is_spike_window(spikes: JsonValue) -> bool:
    losses = spikes.get("losses", []) if isinstance(spikes, dict) else None
    if not isinstance(spikes, dict) or not isinstance(losses, list):
        return False
    counts = spikes.get("count", 0), spikes.get("skipped_in_a_row", 0)
    return all(type(loss) in (int, float) for loss in losses) and all(map(_is_count, counts))
