"""Manifest of a routing record: which model chose, which tokens there are, and a SHA-256 of every file. No torch.

    RECORD/
      NAME.safetensors    some sequences: token ids, expert ids, where each sequence starts and which row it was
      manifest.json       written last: a folder without one is incomplete

docs/routing_replay.md describes the format for other programs.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import Field, ValidationError

from trainer.atomic_io import NotRegular, open_regular, replace_file
from trainer.checkpoint.manifest import FileName
from trainer.config.base import Config, Problem, repeated
from trainer.config.nodes import dotted, shown_path
from trainer.config.numbers import Experts, ExtraExperts, Length, Whole
from trainer.data.token_cache.signed_json import hash_of
from trainer.errors import DataError
from trainer.models.config import ModelConfig
from trainer.routing_record.trace_facts import TraceFacts

RECORD_FORMAT = 1
RECORD_MANIFEST = "manifest.json"
_HASH = "manifest_sha256"
_MAX_BYTES = 64 << 20

Origin = Literal["train", "eval", "generate", "engine"]
TENSORS: Final = ("token_ids", "expert_ids", "is_learned", "sequence_starts", "sample_id", "domain")
"""Tensors of every file; others whose first dimension is that of `token_ids`, such as scores, may stand beside them."""


class ModelFacts(Config):
    """Facts of a model that its replay depends on."""

    moe_layers: Annotated[list[Whole], Field(min_length=1)]
    """Indices of the blocks with experts, in the order of `expert_ids`."""
    num_experts: Experts
    num_null_experts: ExtraExperts = 0
    top_k: Experts
    router: Annotated[str, Field(min_length=1, max_length=300)]
    """Kind of the router."""

    @classmethod
    def of(cls, model: ModelConfig) -> Self:
        """Return the facts of a model whose routing can be recorded."""
        moe = model.moe
        assert moe is not None and moe.router.recorded_k is not None, "checked before"
        return cls(
            moe_layers=list(model.moe_layers),
            num_experts=moe.num_experts,
            num_null_experts=moe.router.num_null_experts,
            top_k=moe.router.recorded_k,
            router=moe.router.kind,
        )

    @property
    def num_choices(self) -> int:
        """Expert ids are below this: null experts follow the others."""
        return self.num_experts + self.num_null_experts


class TrainedRows(Config):
    """What the numbers of training rows depend on, and how the record goes through them."""

    seed: Whole
    seq_len: Length
    packing: Literal["wrapped", "bfd"]
    data_fingerprint: str
    every: Annotated[int, Field(gt=0)]
    """Steps between recorded steps."""


class RecordedFile(Config):
    """One safetensors file."""

    size_bytes: Whole
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    num_sequences: Whole
    num_tokens: Whole


class RecordFacts(Config):
    """What is known of a routing record before its files are written."""

    format: Literal[1] = 1
    origin: Origin
    """What ran the model: training, evaluation, generation, or an inference engine."""
    made_by: Annotated[str, Field(max_length=300)]
    """Run and checkpoint, or engine and file, for people."""
    model: ModelFacts
    vocab_size: Annotated[int, Field(gt=0, le=2**24)]
    """Token ids are below this."""
    tokenizer_fingerprint: str | None = None
    """None: unknown, as of an engine."""
    rows: TrainedRows | None = None
    """Of training rows only."""
    domains: list[str] = Field(default=[])
    """Names that `domain` counts."""
    trace: TraceFacts | None = None
    """Of traces only (docs/traces.md)."""


class RecordManifest(RecordFacts):
    """Manifest of a routing record."""

    files: dict[FileName, RecordedFile]

    def problems(self) -> Iterator[Problem]:
        """Refuse a record that cannot be replayed."""
        if not self.files:
            yield Problem("files", "is empty")
        for layer in repeated(self.model.moe_layers):
            yield Problem("model.moe_layers", f"{layer} is there twice")
        if self.model.top_k > self.model.num_choices:
            yield Problem("model.top_k", f"{self.model.top_k} of {self.model.num_choices} experts")
        if self.trace is not None and self.trace.num_ranked:
            if not self.model.top_k <= self.trace.num_ranked <= self.model.num_choices:
                yield Problem("trace.num_ranked", f"{self.trace.num_ranked} is not from top_k to the number of experts")
            if self.trace.largest_top_k > self.trace.num_ranked:
                yield Problem("trace.largest_top_k", f"{self.trace.largest_top_k} is above trace.num_ranked")


def write_record_manifest(folder: Path, manifest: RecordManifest) -> None:
    """Write a record's manifest, once all files are on the disk."""
    exclude = {"trace"} if manifest.trace is None else None  # a plain record is as older versions wrote it
    values = manifest.model_dump(mode="json", exclude=exclude)
    replace_file(folder / RECORD_MANIFEST, json.dumps({**values, _HASH: hash_of(values)}, indent=1))


def read_record_manifest(folder: Path) -> RecordManifest:
    """Return a record's manifest.

    Raises:
        DataError: if the folder is no record or an incomplete one, or the manifest is damaged or of another version.
    """
    path = folder / RECORD_MANIFEST
    values = _values(path, folder)
    stated = values.pop(_HASH, None)
    if stated != hash_of(values):
        raise DataError(f"{shown_path(path)}: is damaged (its hash does not match its content); record again")
    if values.get("format") != RECORD_FORMAT:
        version = values.get("format")
        shown = version if isinstance(version, int) else type(version).__name__
        raise DataError(
            f"{shown_path(folder)}: is a routing record of format {shown}, and this version reads {RECORD_FORMAT}; "
            "use the version that wrote it"
        )
    try:
        return RecordManifest.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = f"{dotted(first['loc'])}: " if first["loc"] else ""
        raise DataError(f"{shown_path(path)}: {where}{first['msg']:.200}") from None


def _values(path: Path, folder: Path) -> dict[str, Any]:
    try:
        with os.fdopen(open_regular(path, os.O_RDONLY, through_links=True), "rb") as file:
            data = file.read(_MAX_BYTES + 1)
        values = json.loads(data) if len(data) <= _MAX_BYTES else None
    except NotRegular:
        values = None
    except FileNotFoundError:
        if not folder.is_dir():
            raise DataError(f"{shown_path(folder)}: there is no such folder; name a routing record") from None
        raise DataError(
            f"{shown_path(folder)}: has no {RECORD_MANIFEST}, so it is no routing record, or one whose recording did "
            "not finish; let it finish, or record again"
        ) from None
    except OSError as error:
        raise DataError(f"{shown_path(path)}: cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise DataError(f"{shown_path(path)}: is damaged (no JSON object); record again")
    return values
