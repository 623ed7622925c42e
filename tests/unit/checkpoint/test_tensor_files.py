"""What a rank reads of the files of a checkpoint."""

import re
from pathlib import Path

import torch

from tests.checkpoint_helpers import save_unseen
from trainer.checkpoint.checkpoint_folder import CheckpointFolder
from trainer.checkpoint.find_checkpoint import find
from trainer.checkpoint.state import Slice, TrainState
from trainer.checkpoint.tensor_files import StoredTensors

_MB = 1 << 20


def _peak_bytes() -> int:
    """Return the most memory that this process has had since it last asked, mapped files included."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    Path("/proc/self/clear_refs").write_text("5")  # from now on
    return int(found[1]) << 10


def test_only_the_rows_that_are_asked_for_are_read(tmp_path: Path) -> None:
    """Of 96 MB, 8: they are in memory as the file's pages and as a tensor, the others are not."""
    whole = torch.arange(96 * _MB // 4, dtype=torch.int32).view(96, -1)
    save_unseen(CheckpointFolder(tmp_path), 1, TrainState(slices={"model.w": Slice.whole(whole)}))
    found = find(CheckpointFolder(tmp_path), 1)
    with StoredTensors(found.path, found.manifest) as tensors:
        tensors.read("model.w", 0, 0)
        _peak_bytes()
        before = _peak_bytes()
        rows = tensors.read("model.w", 40, 8).clone()
        more = _peak_bytes() - before
    assert torch.equal(rows, whole[40:48]) and 8 * _MB <= more < 24 * _MB, more / _MB
