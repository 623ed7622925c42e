"""Values that are not finite are never saved; a checkpoint of an older version that has some is not intact."""

from pathlib import Path

import pytest
import torch

from tests.checkpoint_helpers import save, save_unseen
from trainer.checkpoint import safetensors_file
from trainer.checkpoint.checkpoint_folder import CheckpointFolder
from trainer.checkpoint.find_checkpoint import find_newest
from trainer.checkpoint.finite import check_finite, not_finite
from trainer.checkpoint.state import Slice, TrainState
from trainer.checkpoint.tools.listing import list_checkpoints
from trainer.checkpoint.tools.pruning import plan_prune
from trainer.distributed.collectives import Group
from trainer.errors import CheckpointError, NumericsError

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
NAN, INF = torch.nan, torch.inf


def _state(value: float = 1.0, dtype: torch.dtype = torch.float32) -> TrainState:
    ill = torch.ones(5, 3, dtype=dtype)
    ill[4, 1] = value
    return TrainState(slices={"model.a": Slice.whole(torch.ones(4)), "model.b": Slice.whole(ill)})


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_single_bad_value_is_found_in_memory_and_on_disk(tmp_path: Path, dtype: torch.dtype, value: float) -> None:
    state = _state(value, dtype)
    assert not_finite({name: part.tensor for name, part in state.slices.items()}) == ["model.b"]
    path = save_unseen(tmp_path, 3, state).path
    assert (
        CheckpointFolder(tmp_path).defect(3) == f"{path}: model.b is not finite: the run had diverged when it was saved"
    )


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_largest_values_are_finite_although_their_sum_is_not(tmp_path: Path, dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    tensor = torch.tensor([[largest, largest], [-largest, torch.finfo(dtype).tiny]], dtype=dtype)
    assert not_finite({"model.a": tensor, "model.b": tensor[:1]}) == []
    save(tmp_path, 3, TrainState(slices={"model.a": Slice.whole(tensor)}))
    assert CheckpointFolder(tmp_path).defect(3) is None


def test_infinities_that_cancel_are_found() -> None:
    assert not_finite({"model.a": torch.tensor([INF, -INF]), "model.b": torch.tensor(NAN)}) == ["model.a", "model.b"]


def test_integer_and_empty_tensors_are_ignored(tmp_path: Path) -> None:
    tensors = {"model.a": torch.full((3,), -1), "model.b": torch.ones(2, dtype=torch.bool), "model.c": torch.ones(0, 4)}
    assert not_finite(tensors) == []
    save(tmp_path, 3, TrainState(slices={name: Slice.whole(tensor) for name, tensor in tensors.items()}))
    assert CheckpointFolder(tmp_path).defect(3) is None


@pytest.mark.parametrize("place", [0, 6, 7, 29])
def test_a_large_tensor_is_checked_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: int) -> None:
    monkeypatch.setattr(safetensors_file, "_BLOCK_BYTES", 28)
    tensor = torch.ones(30)
    tensor[place] = NAN
    slices = {"model.a": Slice.whole(torch.ones(3)), "model.b": Slice.whole(tensor), "model.c": Slice.whole(tensor[:1])}
    save_unseen(tmp_path, 3, TrainState(slices=slices))
    assert "model.b is not finite" in str(CheckpointFolder(tmp_path).defect(3))


def test_experts_are_named_by_their_global_numbers(tmp_path: Path) -> None:
    """Return experts 6 to 8, two of them not finite."""
    tensor = torch.ones(3, 2, 2)
    tensor[1, 0, 0], tensor[2, 1, 1] = NAN, INF
    slices = {"model.w_in": Slice(tensor=tensor, global_shape=(9, 2, 2), start=6, is_of_experts=True)}
    with pytest.raises(NumericsError, match=r"^step 5: model\.w_in \(expert 7 and 1 more\) is not finite; nothing"):
        check_finite(slices, Group.of_one(), CheckpointFolder(tmp_path), step=5)
    slices = {"model.w_in": slices["model.w_in"].at([0, 4, 8])}
    with pytest.raises(NumericsError, match=r"^step 5: model\.w_in \(expert 4 and 1 more\) is not finite; nothing"):
        check_finite(slices, Group.of_one(), CheckpointFolder(tmp_path), step=5)


def test_a_refused_save_names_the_tensor_the_step_and_the_last_good_checkpoint(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=1)
    with pytest.raises(
        NumericsError, match=r"step 5: model\.b is not finite; nothing of it is saved; there is no good"
    ):
        save(folder, 5, _state(NAN))
    save(folder, 5, _state())
    save_unseen(CheckpointFolder(tmp_path), 6, _state(NAN))  # by an older version
    with pytest.raises(NumericsError, match=r"the last good checkpoint is .*/step_00000005: lower schedule\.peak_lr"):
        save(folder, 7, _state(INF))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000005", "step_00000006"]


def test_sharded_experts_are_named_by_their_global_numbers(tmp_path: Path) -> None:
    tensor = torch.ones(8, 3)
    tensor[5, 1] = tensor[7, 0] = NAN
    names = ["model.x.experts.w", "optim.exp_avg.x.experts.w", "optim.exp_avg_sq.x.experts.w"]
    slices = {n: Slice(tensor=tensor, global_shape=(8, 3), is_of_experts=True) for n in reversed(names)}
    with pytest.raises(
        NumericsError,
        match=r"step 2: model\.x\.experts\.w \(expert 5 and 1 more\) is not finite \(and 2 more tensors\);",
    ):
        save(tmp_path, 2, TrainState(slices=slices))


# --- checkpoints of older versions ------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> CheckpointFolder:
    """Save two good checkpoints, and three newer ones that are not finite."""
    folder = CheckpointFolder(tmp_path, keep=99)
    for step in (1, 2):
        save(folder, step, _state())
    for step in (3, 4, 5):
        save_unseen(folder, step, _state(NAN))
    return CheckpointFolder(tmp_path, keep=2)


def test_checkpoints_that_are_not_finite_are_skipped(folder: CheckpointFolder) -> None:
    said: list[str] = []
    found = find_newest(folder, Group.of_one(), warn=said.append)
    assert found is not None and found.step == 2
    assert said[0] == (
        f"{folder.of_step(5)}: model.b is not finite: the run had diverged when it was saved; using step 2 instead"
    )
    assert len(said) == 3


def test_checkpoints_that_are_not_finite_do_not_displace_good_ones(folder: CheckpointFolder) -> None:
    assert plan_prune(folder, with_damaged=False).keep == [1, 2]
    assert plan_prune(folder, with_damaged=True).remove == [3, 4, 5]
    save(folder, 6, _state())
    assert folder.steps() == [2, 3, 4, 5, 6], "the newest two good ones stay, and those between them do no harm"


def test_a_run_that_resumed_before_them_removes_them(folder: CheckpointFolder) -> None:
    folder.remove(2)
    save(folder, 2, _state())
    assert folder.steps() == [1, 2]


def test_a_list_with_content_reports_values_that_are_not_finite(folder: CheckpointFolder) -> None:
    wrong = [entry.wrong for entry in list_checkpoints(folder, with_content=True)]
    assert wrong[:2] == [None, None] and all("model.b is not finite" in str(reason) for reason in wrong[2:])
    assert [entry.wrong for entry in list_checkpoints(folder, with_content=False)] == [None] * 5


def test_if_all_checkpoints_are_not_finite_it_is_an_error(tmp_path: Path) -> None:
    save_unseen(tmp_path, 3, _state(NAN))
    with pytest.raises(CheckpointError, match=r"model\.b is not finite: .*; no other checkpoint is left"):
        find_newest(CheckpointFolder(tmp_path), Group.of_one(), warn=print)
