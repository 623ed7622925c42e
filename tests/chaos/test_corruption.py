"""Law: every damage to a checkpoint is detected, and the previous one is used, bit for bit."""

from functools import partial
from pathlib import Path

import pytest

from tests.chaos.corruption import CORRUPTIONS, STEPS, corrupt, make_run
from tests.ranks import Ranks
from trainer.checkpoint import find_checkpoint as module
from trainer.checkpoint.checkpoint_folder import CheckpointFolder


@pytest.fixture(scope="module")
def run(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    make_run(folder, ranks)
    return folder


def test_the_run_that_is_damaged_has_several_files_of_each_rank(run: Path) -> None:
    folder = CheckpointFolder(run)
    assert folder.steps() == [*STEPS]
    names = sorted(path.name for path in folder.of_step(STEPS[-1]).iterdir())
    assert sum(name.startswith("tensors-00000-") for name in names) >= 2
    assert sum(name.startswith("tensors-00001-") for name in names) >= 2


def test_every_corruption_is_noticed_and_a_sound_checkpoint_is_left(run: Path) -> None:
    result = corrupt(run, 150, seed=0)
    assert result.not_noticed == [] and result.not_loadable == [], result
    assert result.count == 150 and result.by_harm.keys() == CORRUPTIONS.keys()
    assert len(result.by_file) == len(list(CheckpointFolder(run).of_step(STEPS[-1]).iterdir()))
    assert CheckpointFolder(run).defect(STEPS[-1]) is None, "as it was"


def test_without_the_hashes_of_files_corruptions_go_unnoticed(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: without the check, corruptions are missed."""
    monkeypatch.setattr(module, "check_file", partial(module.check_file, with_content=False))
    result = corrupt(run, 150, seed=0)
    assert len(result.not_noticed) > 10, result
    assert not any("manifest.json" in what for what in result.not_noticed if "swapped" not in what), "it has its own"
