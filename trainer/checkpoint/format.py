"""One checkpoint on disk: safetensors files and a JSON manifest with their SHA-256. Nothing in it can execute code.

    step_00000500/
      tensors-00000.safetensors     slices of named global tensors
      manifest.json                 names, shapes, where each slice is, the files' sizes and hashes, its own hash

A safetensors file with a flipped bit loads without a word, so every byte is hashed in memory while it is written and
checked before it is used.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from trainer.checkpoint.state import Slice, TrainState
from trainer.durable import sync_folder
from trainer.errors import CheckpointError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
_FILE_SIZE_BYTES = 512 << 20  # bounds the copy in memory while a file is hashed and written


def write_checkpoint(folder: Path, state: TrainState, info: Mapping[str, Any]) -> None:
    """Write a state into an existing empty folder and flush it to the disk; the manifest comes last.

    Args:
        folder: not yet under its final name.
        state: what to save.
        info: JSON values that describe the run: step, position, model, fingerprints, versions.

    Raises:
        OSError: if the disk refuses.
    """
    tensors: dict[str, Any] = {}
    files: dict[str, Any] = {}
    for number, names in enumerate(_split_by_size(state.slices)):
        file = f"tensors-{number:05d}.safetensors"
        data = safetensors.torch.save({name: state.slices[name].tensor.contiguous().cpu() for name in names})
        files[file] = {"size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        _write_durably(folder / file, data)
        for name in names:
            part = state.slices[name]
            tensors[name] = {
                "dtype": str(part.tensor.dtype).removeprefix("torch."),
                "global_shape": list(part.global_shape),
                "slices": [{"file": file, "start": part.start, "length": (part.tensor.shape or (1,))[0]}],
            }
    manifest = {"format": FORMAT_VERSION, **info, "values": state.values, "tensors": tensors, "files": files}
    manifest["manifest_sha256"] = _manifest_hash(manifest)
    _write_durably(folder / MANIFEST, json.dumps(manifest, indent=1).encode())
    sync_folder(folder)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return a checkpoint's manifest.

    Raises:
        CheckpointError: if it is missing, damaged or of a newer format.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        stated = manifest.pop("manifest_sha256")
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: has no {MANIFEST}, so it is not a checkpoint") from None
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{folder / MANIFEST}: is damaged ({type(error).__name__})") from None
    if stated != _manifest_hash(manifest):
        raise CheckpointError(f"{folder / MANIFEST}: is damaged (its hash does not match its content)")
    if manifest["format"] > FORMAT_VERSION:
        raise CheckpointError(
            f"{folder}: has format {manifest['format']}, this version reads up to {FORMAT_VERSION}; use a newer Turnout"
        )
    return manifest


def read_checkpoint(folder: Path, manifest: Mapping[str, Any]) -> TrainState:
    """Return a checkpoint's state, every byte checked against the manifest.

    Raises:
        CheckpointError: naming the file that is missing or damaged.
    """
    loaded: dict[str, Tensor] = {}
    for file, stated in manifest["files"].items():
        loaded.update(_read_file(folder / Path(file).name, stated))
    slices = {}
    for name, entry in manifest["tensors"].items():
        (part,) = entry["slices"]
        slices[name] = Slice(tensor=loaded[name], global_shape=tuple(entry["global_shape"]), start=part["start"])
    return TrainState(slices=slices, values=dict(manifest["values"]))


def _read_file(path: Path, stated: Mapping[str, Any]) -> dict[str, Tensor]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    if len(data) != stated["size_bytes"]:
        raise CheckpointError(f"{path}: is damaged ({len(data)} bytes instead of {stated['size_bytes']})")
    if hashlib.sha256(data).hexdigest() != stated["sha256"]:
        raise CheckpointError(f"{path}: is damaged (its SHA-256 is not the one in {MANIFEST})")
    return safetensors.torch.load(data)


def _split_by_size(slices: Mapping[str, Slice]) -> Iterator[list[str]]:
    """Yield names whose tensors fill one file each."""
    names: list[str] = []
    size = 0
    for name, part in slices.items():
        size_bytes = part.tensor.numel() * part.tensor.element_size()
        if names and size + size_bytes > _FILE_SIZE_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += size_bytes
    if names:
        yield names


def _write_durably(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _manifest_hash(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
