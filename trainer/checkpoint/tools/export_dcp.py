"""A checkpoint as torch.distributed.checkpoint (DCP) files, for programs that read nothing else.

Never read back by us: DCP files are pickles, which can execute code where they are loaded, and have no hashes.
"""

import shutil
import uuid
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from trainer.atomic_io import sync_folder
from trainer.checkpoint.checkpoint_folder import CheckpointFolder
from trainer.checkpoint.compatible import check_record
from trainer.checkpoint.find_checkpoint import CheckpointHandle, find
from trainer.checkpoint.tensor_files import StoredTensors
from trainer.config.nodes import shown_path
from trainer.errors import CheckpointError, ConfigError


def export_dcp(folder: CheckpointFolder, step: int | None, out: Path) -> CheckpointHandle:
    """Write a checkpoint's whole tensors, and the numbers that describe the run, into a new folder of DCP files.

    Tensors have the names that docs/checkpoint.md gives them; `step`, `position` and `optimizer_steps` are int64
    tensors without dimensions. The whole checkpoint is in memory once. `out` is there whole or not at all; a killed
    export leaves a folder beside it whose name begins with a dot.

    Args:
        folder: of the run.
        step: of the checkpoint; None: the newest, which must be sound.
        out: must not exist; its parent must.

    Returns:
        The checkpoint; what was written was read back and found equal to it.

    Raises:
        ConfigError: if `out` exists or its parent does not.
        CheckpointError: if there is no such checkpoint, it is not sound or does not describe its run, or what was
            written is not the source bit for bit.
        OSError: if the disk refuses.
    """
    if "\0" in str(out):
        raise ConfigError(f"{shown_path(out)}: is no path; name a folder")
    if out.is_symlink() or out.exists():
        raise ConfigError(f"{out}: exists; name a folder that does not")
    if not out.parent.is_dir():
        raise ConfigError(f"{out.parent}: is no folder; make it first")
    found = find(folder, folder.resolve_step(step))
    check_record(found)
    temporary = out.with_name(f".export-{uuid.uuid4().hex}")
    temporary.mkdir()
    try:
        with StoredTensors(found.path, found.manifest) as tensors, warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as it shall be
            state = _numbers(found) | {name: tensors.read(name) for name in found.manifest.tensors}
            # More threads lose errors: a save that failed would be reported as done (pytorch#191391).
            writer = dcp.FileSystemWriter(temporary, thread_count=1, sync_files=True)
            dcp.save(state, storage_writer=writer, no_dist=True)
            _compare(state, temporary, out)
        sync_folder(temporary)
        temporary.rename(out)
        sync_folder(out.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return found


def _numbers(found: CheckpointHandle) -> dict[str, Tensor]:
    values = {
        "step": found.step,
        "position": found.run["position"],
        "optimizer_steps": found.manifest.values["optimizer_steps"],
    }
    return {name: torch.tensor(value, dtype=torch.int64) for name, value in values.items()}


def _compare(state: Mapping[str, Tensor], folder: Path, out: Path) -> None:
    """Read everything back and compare it bit for bit, one tensor at a time."""
    reader = dcp.FileSystemReader(folder)
    names = reader.read_metadata().state_dict_metadata.keys()
    if names != state.keys():
        raise CheckpointError(f"{out}: not written: {sorted(names ^ state.keys())[0]} is in one and not in the other")
    for name, tensor in state.items():
        back = {name: torch.zeros_like(tensor)}
        dcp.load(back, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
        if not torch.equal(_bytes(back[name]), _bytes(tensor)):
            raise CheckpointError(f"{out}: not written: {name} differs when it is read back")


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
