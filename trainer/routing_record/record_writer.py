"""Write a routing record: sequences with the experts of each token, in files of bounded size.

# n tokens of a sequence, L MoE layers, k experts per token.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainer import fault_injection
from trainer.atomic_io import replace_file, replacing
from trainer.config.nodes import shown, shown_path
from trainer.data.tokenizers.base import token_dtype
from trainer.errors import ConfigError, DataError, ResourceError
from trainer.routing_record.record_manifest import (
    RECORD_MANIFEST,
    ModelFacts,
    RecordedFile,
    RecordFacts,
    RecordManifest,
    write_record_manifest,
)

_MAX_BUFFERED_BYTES = 256 << 20
_RUN_ID = "run_id"
"""File with the id of the training run that records into a folder."""
_NAME = re.compile(r"(?:step(\d{9})-)?(\d{6})-rank(\d{4})\.safetensors")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RoutedSequence:
    """Tokens that a model read one after the other, and the experts of each."""

    tokens: NDArray[np.integer]
    """(n,) token ids."""
    experts: NDArray[np.integer]
    """(n, L, k) expert ids before drops; or (n - 1, L, k), if the last token was written and never read."""
    is_learned: NDArray[np.bool_] | None = None
    """(n,) the token counts in a loss, once it is predicted. None: every token."""
    sample_id: int
    """Number of the row, or of the sequence."""
    domain: int = 0
    traced: Mapping[str, NDArray[np.generic]] = field(default_factory=dict)
    """(n, ...) what a trace has beside the experts, by name."""


def expert_dtype(num_choices: int) -> np.dtype[np.unsignedinteger]:
    """Return the smallest unsigned type for expert ids below `num_choices`, and for its largest value: no expert."""
    return token_dtype(num_choices + 1)


class RecordWriter:
    """Writes the sequences of one rank into a folder, which `finish` makes a record."""

    def __init__(self, folder: Path, model: ModelFacts, *, vocab_size: int, rank: int = 0) -> None:
        self._folder, self._model, self._rank = folder, model, rank
        self._token_dtype, self._expert_dtype = token_dtype(vocab_size), expert_dtype(model.num_choices)
        self._sequences: list[RoutedSequence] = []
        self._buffered_bytes = self._number = 0
        self.step: int | None = None
        """Completed steps of a training run, which are part of a file's name."""

    def add(self, sequence: RoutedSequence) -> None:
        """Add a sequence; buffered ones are written once they are many."""
        n, experts = len(sequence.tokens), sequence.experts
        shape = (len(self._model.moe_layers), self._model.top_k)
        assert n and experts.shape[1:] == shape and n - len(experts) in (0, 1), f"{experts.shape} for {n} tokens"
        self._sequences.append(sequence)
        assert all(len(part) == n for part in sequence.traced.values()), "a trace has values of every token"
        self._buffered_bytes += sequence.tokens.nbytes + experts.nbytes
        self._buffered_bytes += sum(part.nbytes for part in sequence.traced.values())
        if self._buffered_bytes > _MAX_BUFFERED_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write the buffered sequences to a new file.

        Raises:
            ResourceError: if the disk refuses.
        """
        if not self._sequences:
            return
        self._number += 1
        prefix = "" if self.step is None else f"step{self.step:09}-"
        name = f"{prefix}{self._number:06}-rank{self._rank:04}.safetensors"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._write(self._folder / name)
        except OSError as error:
            raise ResourceError(
                f"{shown_path(self._folder)}: the routing record cannot be written: {error.strerror or error}; free "
                "some space, or record less"
            ) from None
        self._sequences, self._buffered_bytes = [], 0

    def _write(self, path: Path) -> None:
        from safetensors.numpy import save

        lengths = [len(sequence.tokens) for sequence in self._sequences]
        none = np.iinfo(self._expert_dtype).max
        experts = np.full((sum(lengths), len(self._model.moe_layers), self._model.top_k), none, self._expert_dtype)
        starts = np.cumsum([0, *lengths])
        for start, sequence in zip(starts, self._sequences, strict=False):
            experts[start : start + len(sequence.experts)] = sequence.experts
        learned = [np.ones(len(s.tokens), bool) if s.is_learned is None else s.is_learned for s in self._sequences]
        traced = {name: np.concatenate([s.traced[name] for s in self._sequences]) for name in self._sequences[0].traced}
        if "further_experts" in traced:
            traced["further_experts"] = traced["further_experts"].astype(self._expert_dtype)
        content = save(
            {
                **traced,
                "token_ids": np.concatenate([s.tokens for s in self._sequences]).astype(self._token_dtype),
                "expert_ids": experts,
                "is_learned": np.concatenate(learned),
                "sequence_starts": starts.astype(np.int64),
                "sample_id": np.array([s.sample_id for s in self._sequences], np.int64),
                "domain": np.array([s.domain for s in self._sequences], np.int64),
            }
        )
        with replacing(path) as file:
            file.write(content)
            fault_injection.hit("routing_record.written")


def finish_record(folder: Path, facts: RecordFacts) -> RecordManifest:
    """Make a folder a record of the files that all ranks have written to it, and return its manifest.

    Raises:
        DataError: if nothing has been recorded.
        ResourceError: if the disk refuses.
    """
    from safetensors import safe_open

    files = {}
    try:
        for path in sorted(folder.glob("*.safetensors")):
            with path.open("rb") as file:
                sha256, size_bytes = hashlib.file_digest(file, "sha256").hexdigest(), file.tell()
            with safe_open(path, framework="numpy") as tensors:
                num_tokens, *_ = tensors.get_slice("token_ids").get_shape()
                num_sequences, *_ = tensors.get_slice("sample_id").get_shape()
            files[path.name] = RecordedFile(
                size_bytes=size_bytes, sha256=sha256, num_sequences=num_sequences, num_tokens=num_tokens
            )
        if not files:
            raise DataError(f"{shown_path(folder)}: there was nothing to record: no token was read")
        finished = RecordManifest(**facts.model_dump(), files=files)
        fault_injection.hit("routing_record.before_manifest")
        write_record_manifest(folder, finished)
    except OSError as error:
        raise ResourceError(f"{shown_path(folder)}: cannot be written: {error.strerror or error}") from None
    return finished


def claim_record_folder(folder: Path, run_id: str, *, is_in_run: bool) -> None:
    """Note in a folder which run records into it, so that no other one removes or continues what is there.

    A folder that `is_in_run`, the run's own, needs no note: it went with the run if that was copied or branched.

    Raises:
        ConfigError: if the folder has the record of another run, or other files.
        ResourceError: if the disk refuses.
    """
    note = folder / _RUN_ID
    try:
        folder.mkdir(parents=True, exist_ok=True)
        owner = note.read_bytes()[:100].decode("utf-8", "replace").strip() if note.is_file() else None
        if not is_in_run and owner != run_id and any(folder.iterdir()):
            what = "has files of others" if owner is None else f"is the record of another run ({shown(owner)})"
            raise ConfigError(
                f"metrics.routing_record.path: {shown_path(folder)} {what}, which recording would change; name a "
                "folder of its own for each run"
            )
        if owner != run_id:
            replace_file(note, f"{run_id}\n")
    except OSError as error:
        raise ResourceError(
            f"metrics.routing_record: {shown_path(folder)}: cannot be written: {error.strerror or error}"
        ) from None


def keep_recorded_steps(folder: Path, *, up_to: int) -> None:
    """Remove from a folder what was recorded after `up_to` completed steps, which a resumed run records again.

    The folder is incomplete until its run ends. Files of others are never removed.
    """
    if not folder.is_dir():
        return
    (folder / RECORD_MANIFEST).unlink(missing_ok=True)
    for path in folder.glob("*.safetensors"):
        match = _NAME.fullmatch(path.name)
        if match is not None and int(match[1] or 0) > up_to:
            path.unlink()
    for path in folder.glob(".step*.safetensors*"):  # left by a killed process
        path.unlink()
