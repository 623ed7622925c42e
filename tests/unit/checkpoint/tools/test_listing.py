"""A list of checkpoints shows the content of manifests without trusting it."""

import shutil
from pathlib import Path

import pytest
import torch

from tests.checkpoint_helpers import save
from tests.unit.checkpoint.test_manifest import FILE, rewrite
from trainer.checkpoint.checkpoint_folder import CheckpointFolder
from trainer.checkpoint.state import Slice, TrainState
from trainer.checkpoint.tools.listing import list_checkpoints

LAYOUT = {"world_size": 2, "ep_size": 2, "data": "replicate", "engine": "native"}


@pytest.fixture
def folder(tmp_path: Path) -> CheckpointFolder:
    folder = CheckpointFolder(tmp_path)
    for step in (1, 2):
        save(folder, step, TrainState(slices={"model.a": Slice.whole(torch.ones(4))}), {"layout": LAYOUT})
    return folder


def test_oldest_first_with_size_time_and_layout(folder: CheckpointFolder) -> None:
    first, second = list_checkpoints(folder, with_content=False)
    assert (first.step, second.step) == (1, 2)
    assert first.size_bytes == (folder.of_step(1) / FILE).stat().st_size
    assert first.written_s == (folder.of_step(1) / "manifest.json").stat().st_mtime
    assert first.layout_text == "2 ranks, ep 2, replicate" and first.wrong is None
    assert first.record()["layout"] == LAYOUT


def test_a_changed_byte_is_found_with_content_and_a_changed_size_always(folder: CheckpointFolder) -> None:
    file = folder.of_step(2) / FILE
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert [entry.wrong for entry in list_checkpoints(folder, with_content=False)] == [None, None]
    sound, damaged = list_checkpoints(folder, with_content=True)
    assert sound.wrong is None and damaged.wrong is not None and "its SHA-256" in damaged.wrong
    file.write_bytes(b"")
    assert [entry.wrong is None for entry in list_checkpoints(folder, with_content=False)] == [True, False]


def test_without_a_manifest_there_is_a_time_and_a_reason(folder: CheckpointFolder) -> None:
    (folder.of_step(1) / "manifest.json").unlink()
    first = next(list_checkpoints(folder, with_content=False))
    assert first.size_bytes is None and first.layout_text == "-"
    assert first.wrong is not None and "has no manifest.json" in first.wrong


def test_a_checkpoint_removed_meanwhile_is_left_out(folder: CheckpointFolder) -> None:
    found = list_checkpoints(folder, with_content=False)
    assert next(found).step == 1
    shutil.rmtree(folder.of_step(2))
    assert list(found) == []


def test_a_malformed_layout_is_not_shown(folder: CheckpointFolder) -> None:
    rewrite(
        folder.of_step(1), lambda values: values["run"].update(layout={"world_size": [1], "data": "a\n\x1b[2J" * 99})
    )
    rewrite(folder.of_step(2), lambda values: values["run"].update(layout="x"))
    first, second = list_checkpoints(folder, with_content=False)
    assert first.layout.keys() == {"data"} and first.layout_text.isprintable() and len(first.layout_text) < 80
    assert second.layout == {}
