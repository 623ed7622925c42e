"""One-line helpers for checkpoints: save from one process, read whole."""

import hashlib
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from trainer.checkpoint.checkpoint_folder import CheckpointFolder
from trainer.checkpoint.find_checkpoint import CheckpointHandle, find
from trainer.checkpoint.saver import Saved, Saver
from trainer.checkpoint.state import TrainState
from trainer.checkpoint.tensor_files import StoredTensors
from trainer.distributed.mesh import Mesh
from trainer.engine.base import Engine


def save(folder: CheckpointFolder | Path, step: int, state: TrainState, run: dict[str, Any] | None = None) -> Saved:
    """Save and wait; raise any error."""
    saved = try_to_save(folder, step, state, run)
    if saved.error is not None:
        raise saved.error
    return saved


def save_unseen(folder: CheckpointFolder | Path, step: int, state: TrainState, run: Any = None) -> Saved:
    """Save without the check for finite numbers."""
    with patch("trainer.checkpoint.saver.check_finite", lambda *_, **__: None):
        return save(folder, step, state, run)


def try_to_save(folder: CheckpointFolder | Path, step: int, state: TrainState, run: Any = None) -> Saved:
    saver = Saver(folder if isinstance(folder, CheckpointFolder) else CheckpointFolder(folder), Mesh.of_one())
    saver.start(step, state, run or {})
    saved = saver.wait()
    saver.close()
    assert saved is not None
    return saved


def whole(found: CheckpointHandle) -> dict[str, Tensor]:
    """Return every tensor of a checkpoint."""
    with StoredTensors(found.path, found.manifest) as tensors:
        return {name: tensors.read(name) for name in found.manifest.tensors}


def load(folder: CheckpointFolder | Path, step: int) -> dict[str, Tensor]:
    """Return every tensor of a step's checkpoint, verified."""
    return whole(find(folder if isinstance(folder, CheckpointFolder) else CheckpointFolder(folder), step))


def digest(tensor: Tensor) -> str:
    """Return the SHA-256 of a tensor's bytes."""
    data = tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(data).hexdigest()


def resume(engine: Engine, folder: CheckpointFolder | Path, step: int) -> CheckpointHandle:
    """Load a step's checkpoint into an engine, which may hold any part of the model."""
    found = find(folder if isinstance(folder, CheckpointFolder) else CheckpointFolder(folder), step)
    with StoredTensors(found.path, found.manifest) as tensors:
        engine.load_state(tensors.like(engine.wanted()))
    return found
