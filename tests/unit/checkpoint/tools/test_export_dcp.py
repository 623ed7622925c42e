"""DCP files equal the checkpoint bit for bit, or do not exist."""

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from tests.checkpoint_helpers import load, save_unseen
from tests.unit.checkpoint.tools.test_verify import RUN, _tensors
from trainer.checkpoint.checkpoint_folder import CheckpointFolder
from trainer.checkpoint.state import Slice, TrainState
from trainer.checkpoint.tools import export_dcp as module
from trainer.checkpoint.tools.export_dcp import export_dcp
from trainer.errors import CheckpointError, ConfigError, ResourceError


@pytest.fixture
def folder(tmp_path: Path) -> CheckpointFolder:
    folder = CheckpointFolder(tmp_path / "checkpoints")
    tensors = {
        **_tensors(),
        "model.half": torch.ones(3, dtype=torch.bfloat16),
        "model.nan": torch.full((2,), torch.nan),
    }
    slices = {name: Slice.whole(tensor) for name, tensor in tensors.items()}
    save_unseen(folder, 3, TrainState(slices=slices, values={"optimizer_steps": 2}), RUN)
    return folder


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_every_tensor_is_exported_bit_for_bit(folder: CheckpointFolder, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_dcp(folder, None, out)
    numbers = {"step": 3, "position": 8, "optimizer_steps": 2}
    source = {**load(folder, 3), **{name: torch.tensor(value) for name, value in numbers.items()}}
    back = {name: torch.zeros_like(tensor) for name, tensor in source.items()}
    dcp.load(back, checkpoint_id=out, no_dist=True)
    for name, tensor in source.items():
        torch.testing.assert_close(back[name], tensor, rtol=0, atol=0, equal_nan=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "out"]


def test_an_export_that_reads_back_differently_is_not_renamed(
    folder: CheckpointFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = dcp.save

    def spoil(state: dict[str, torch.Tensor], **options: object) -> None:
        write({**state, "model.embed.weight": state["model.embed.weight"] + 1}, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(module.dcp, "save", spoil)
    with pytest.raises(CheckpointError, match=r"out: not written: model\.embed\.weight differs"):
        export_dcp(folder, 3, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


def test_after_a_disk_error_nothing_is_left(
    folder: CheckpointFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.dcp, "save", refuse)
    with pytest.raises(ResourceError, match="out: not written: No space left on device; free space"):
        export_dcp(folder, 3, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


@pytest.mark.parametrize("taken", ["folder", "file", "link", "no parent"])
def test_an_existing_target_is_refused(folder: CheckpointFolder, tmp_path: Path, taken: str) -> None:
    out = tmp_path / "out"
    match taken:
        case "folder":
            out.mkdir()
        case "file":
            out.write_text("x")
        case "link":
            out.symlink_to(tmp_path / "nowhere")
        case "no parent":
            out = tmp_path / "a" / "b"
    with pytest.raises(ConfigError, match="is not a folder" if taken == "no parent" else "exists; name a folder that"):
        export_dcp(folder, 3, out)


def test_a_damaged_source_is_refused(folder: CheckpointFolder, tmp_path: Path) -> None:
    file = next(folder.of_step(3).glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="is damaged"):
        export_dcp(folder, 3, tmp_path / "out")
    assert not (tmp_path / "out").exists()
