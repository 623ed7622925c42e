"""Export a checkpoint as torch.distributed.checkpoint (DCP) files, for other programs.

Turnout never loads DCP files: they have no hashes, and are pickles, which can execute code when they are loaded.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from trainer.checkpoint.checkpoint_folder import CheckpointFolder
from trainer.checkpoint.compatible import check_record
from trainer.checkpoint.find_checkpoint import CheckpointHandle, find
from trainer.checkpoint.tensor_files import StoredTensors
from trainer.checkpoint.tools.output_folder import check_output_folder, output_folder
from trainer.errors import CheckpointError


def export_dcp(folder: CheckpointFolder, step: int | None, out: Path) -> CheckpointHandle:
    """Write the checkpoint of a step, None for the newest, into a new folder of DCP files; read back and compare.

    Tensors are whole and have the names of docs/checkpoint.md; `step`, `position` and `optimizer_steps` are int64
    scalars. Needs memory for one whole checkpoint. `out` appears complete or not at all; a killed export leaves a
    folder `.export-*` next to it.

    Raises:
        ConfigError: if `out` exists or its parent does not.
        CheckpointError: if there is no such checkpoint, it is damaged or its record of the run is incomplete, or the
            export differs from it.
        ResourceError: if the disk refuses.
    """
    check_output_folder(out)
    found = find(folder, folder.resolve_step(step))
    check_record(found)
    with (
        output_folder(out) as temporary,
        StoredTensors(found.path, found.manifest) as tensors,
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # intended
        done = found.manifest.values["optimizer_steps"]
        counters = {"step": found.step, "position": found.run["position"], "optimizer_steps": done}
        state = {name: torch.tensor(value, dtype=torch.int64) for name, value in counters.items()}
        state |= {name: tensors.read(name) for name in found.manifest.tensors}
        # With several threads DCP loses errors, and reports a failed save as done (pytorch#191391).
        writer = dcp.FileSystemWriter(temporary, thread_count=1, sync_files=True)
        dcp.save(state, storage_writer=writer, no_dist=True)
        _compare(state, temporary, out)
    return found


def _compare(state: Mapping[str, Tensor], folder: Path, out: Path) -> None:
    """Read the export back and compare it bit for bit, one tensor at a time."""
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
