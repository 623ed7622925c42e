"""Checkpoints are complete or absent, verified, and the newest intact one is used."""

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.checkpoint_helpers import load, save, try_to_save, whole
from tests.unit.checkpoint.test_manifest import rewrite
from trainer.atomic_io import open_regular
from trainer.checkpoint import checkpoint_folder as folder_module
from trainer.checkpoint.checkpoint_folder import CheckpointFolder
from trainer.checkpoint.find_checkpoint import CheckpointHandle, find, find_newest
from trainer.checkpoint.manifest import Manifest
from trainer.checkpoint.saver import Saver
from trainer.checkpoint.state import Slice, TrainState
from trainer.checkpoint.tensor_files import StoredTensors
from trainer.distributed.collectives import Group
from trainer.distributed.mesh import Mesh
from trainer.errors import CheckpointError, ResourceError


def _state(fill: float = 1.0) -> TrainState:
    tensors = {
        "model.a": torch.full((3, 2), fill),
        "model.b": torch.arange(5, dtype=torch.int64),
        "optim.a": torch.tensor(2.5, dtype=torch.float64),
        "model.c": torch.zeros(0, 4),
        "model.d": torch.ones(2, dtype=torch.bfloat16),
    }
    return TrainState(slices={n: Slice.whole(t) for n, t in tensors.items()}, values={"optimizer_steps": 7, "x": 0.1})


@pytest.fixture
def folder(tmp_path: Path) -> CheckpointFolder:
    return CheckpointFolder(tmp_path / "checkpoints", keep=3)


def _silent(line: str) -> None:
    raise AssertionError(f"unexpected warning: {line}")


def _newest(folder: CheckpointFolder, warn: Callable[[str], None] = _silent) -> CheckpointHandle | None:
    return find_newest(folder, Group.of_one(), warn=warn)


def test_a_loaded_state_equals_the_saved_one(folder: CheckpointFolder) -> None:
    saved = save(folder, 40, _state(), {"position": 640})
    assert saved.path.name == "step_00000040"
    found = _newest(folder)
    assert found is not None and found.path == saved.path
    assert found.step == 40 and found.run == {"position": 640}
    assert found.manifest.values == {"optimizer_steps": 7, "x": 0.1}
    tensors = whole(found)
    assert tensors.keys() == _state().slices.keys()
    for name, part in _state().slices.items():
        assert tensors[name].dtype == part.tensor.dtype and tensors[name].shape == part.tensor.shape
        assert torch.equal(tensors[name], part.tensor), name


def test_rows_apart_are_saved_where_they_belong_and_read_back(folder: CheckpointFolder) -> None:
    """A file has one part of a tensor, so runs of rows are in as many files."""
    whole, other = torch.arange(12.0).view(6, 2), torch.arange(4)
    numbers = [4, 0, 1, 5, 3, 2]
    mine = Slice(tensor=whole[numbers], global_shape=(6, 2)).at(numbers)
    state = TrainState(slices={"model.w": mine, "model.x": Slice.whole(other)})
    save(folder, 1, state)
    assert torch.equal(load(folder, 1)["model.w"], whole) and torch.equal(load(folder, 1)["model.x"], other)
    assert len(list(folder.of_step(1).glob("*.safetensors"))) == len(mine.spans) == 5
    found = find(folder, 1)
    with StoredTensors(found.path, found.manifest) as tensors:
        assert torch.equal(tensors.like(state).slices["model.w"].tensor, mine.tensor)


def test_changes_after_the_snapshot_are_not_saved(folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Although it is written to disk later."""
    state, saver = _state(), Saver(folder, Mesh.of_one())
    begin = CheckpointFolder.begin

    def change_first(folder: CheckpointFolder, step: int) -> None:
        state.slices["model.a"].tensor.fill_(-1.0)
        begin(folder, step)

    monkeypatch.setattr(CheckpointFolder, "begin", change_first)
    saver.start(1, state, {})
    assert saver.wait() is not None
    assert float(state.slices["model.a"].tensor[0, 0]) == -1.0
    assert torch.equal(load(folder, 1)["model.a"], torch.ones(3, 2))


def test_a_save_is_not_finished_before_its_rename(folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    may_go_on, saver, commit = threading.Event(), Saver(folder, Mesh.of_one()), CheckpointFolder.commit

    def wait_first(folder: CheckpointFolder, step: int) -> Path:
        may_go_on.wait(60)
        return commit(folder, step)

    monkeypatch.setattr(CheckpointFolder, "commit", wait_first)
    saver.start(1, _state(), {})
    assert saver.finished() is None and folder.steps() == []
    may_go_on.set()
    saved = saver.wait()
    assert saved is not None and saved.error is None and folder.steps() == [1]
    assert saver.finished() is None


def test_a_folder_without_checkpoints_gives_none(folder: CheckpointFolder) -> None:
    assert _newest(folder) is None


def test_the_newest_checkpoints_are_kept_and_every_nth_for_ever(folder: CheckpointFolder) -> None:
    for step in (5, 10, 15, 20):
        save(folder, step, _state())
    assert sorted(p.name for p in folder.path.iterdir()) == ["step_00000010", "step_00000015", "step_00000020"]
    lasting = CheckpointFolder(folder.path, keep=2, keep_every=10)
    for step in (25, 30, 35, 40, 45):
        save(lasting, step, _state())
    assert lasting.steps() == [10, 20, 30, 40, 45]


def test_a_damaged_checkpoint_does_not_count_as_kept(folder: CheckpointFolder) -> None:
    for step in (5, 10, 15):
        save(folder, step, _state())
    manifest = folder.of_step(10) / "manifest.json"
    manifest.write_text(manifest.read_text().replace("7", "8", 1))
    save(folder, 20, _state())
    assert folder.steps() == [5, 10, 15, 20]
    save(folder, 25, _state())
    assert folder.steps() == [15, 20, 25]


def test_an_intact_checkpoint_is_verified_once_and_again_after_a_change(
    folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (5, 10):
        save(folder, step, _state())
    read = []
    check = CheckpointFolder.check
    monkeypatch.setattr(CheckpointFolder, "check", lambda folder, step: (read.append(step), check(folder, step))[1])
    fresh = CheckpointFolder(folder.path, keep=3)
    save(fresh, 15, _state())
    assert read == [], "three are kept, whatever they are"
    save(fresh, 20, _state())
    assert read == [10]
    file = next(folder.of_step(15).glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    save(fresh, 25, _state())
    assert read == [10, 15]
    assert fresh.steps() == [10, 15, 20, 25]


def test_checkpoints_are_ordered_by_name_and_not_by_time(folder: CheckpointFolder) -> None:
    for step in (5, 10):
        save(folder, step, _state(step))
    os.utime(folder.of_step(5), (2e9, 2e9))
    found = _newest(folder)
    assert found is not None and found.step == 10


@pytest.mark.parametrize(
    "name", ["step_10", "step_00000007.tmp", "xstep_00000007", "step_0000000000009", "step_00000011"]
)
def test_other_names_are_not_checkpoints(folder: CheckpointFolder, name: str) -> None:
    save(folder, 5, _state())
    if name == "step_00000011":
        (folder.path / name).symlink_to(folder.of_step(5))
    else:
        (folder.path / name).mkdir()
    assert folder.steps() == [5]


def test_large_states_are_split_over_files(folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.checkpoint.tensor_files.FILE_SIZE_BYTES", 30)
    path = save(folder, 1, _state()).path
    assert len(list(path.glob("*.safetensors"))) == 3
    assert torch.equal(load(folder, 1)["model.a"], torch.ones(3, 2))


def _files(path: Path) -> list[Path]:
    return sorted(path.iterdir())


def test_every_flipped_byte_is_detected(folder: CheckpointFolder) -> None:
    path = save(folder, 1, _state()).path
    for file in _files(path):
        good = file.read_bytes()
        for position in range(0, len(good), max(1, len(good) // 60)):
            bad = bytearray(good)
            bad[position] ^= 0x10
            file.write_bytes(bad)
            with pytest.raises(CheckpointError, match=r"is damaged|has format"):
                find(folder, 1)
        file.write_bytes(good)
    find(folder, 1)


@pytest.mark.parametrize("harm", ["truncate", "empty", "delete", "grow", "link", "folder"])
def test_every_truncated_missing_or_irregular_file_is_detected(
    folder: CheckpointFolder, harm: str, tmp_path: Path
) -> None:
    path = save(folder, 1, _state()).path
    for file in _files(path):
        good = file.read_bytes()
        match harm:
            case "truncate":
                file.write_bytes(good[:-1])
            case "empty":
                file.write_bytes(b"")
            case "delete":
                file.unlink()
            case "grow":
                file.write_bytes(good + b" ")
            case "link":
                file.rename(tmp_path / file.name)
                file.symlink_to(tmp_path / file.name)
            case "folder":
                file.unlink()
                file.mkdir()
        if harm == "grow" and file.name == "manifest.json":
            find(folder, 1)  # white space after JSON does not change its meaning
        else:
            with pytest.raises(CheckpointError):
                find(folder, 1)
        if harm == "folder":
            file.rmdir()
        elif harm == "link":
            file.unlink()
        file.write_bytes(good)


def test_a_checkpoint_saved_while_all_others_are_removed_is_found(
    folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run saves faster than the reader: a listed checkpoint is gone, and a newer one is used."""
    for step in (1, 2):
        save(folder, step, _state())
    manifest = CheckpointFolder.manifest

    def too_late(self: CheckpointFolder, step: int) -> Manifest:
        if step == 2:
            folder.remove(1)
            folder.remove(2)
            save(folder, 3, _state())
        return manifest(self, step)

    monkeypatch.setattr(CheckpointFolder, "manifest", too_late)
    said: list[str] = []
    found = _newest(CheckpointFolder(folder.path), said.append)
    assert found is not None and found.step == 3
    assert said == [f"{folder.of_step(2)}: was removed while it was read, by a run that trains; using step 3 instead"]


def test_a_damaged_newest_checkpoint_is_skipped_with_a_warning(folder: CheckpointFolder) -> None:
    save(folder, 1, _state(1.0))
    file = next(save(folder, 2, _state(2.0)).path.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-3])
    warnings: list[str] = []
    found = _newest(folder, warnings.append)
    assert found is not None and found.step == 1
    assert len(warnings) == 1 and "step_00000002" in warnings[0] and "using step 1 instead" in warnings[0]


def test_a_checkpoint_that_cannot_be_read_now_is_neither_skipped_nor_removed(
    folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process without a free descriptor cannot tell whether a checkpoint is damaged."""
    for step in (5, 10, 15):
        save(folder, step, _state())
    fresh = CheckpointFolder(folder.path, keep=2)
    with monkeypatch.context() as patched:
        patched.setattr("trainer.checkpoint.manifest_file.open_regular", _refuse(errno.EMFILE, of="step_00000015"))
        with pytest.raises(ResourceError, match=r"step_00000015.*cannot be read now: Too many open files"):
            _newest(fresh)
        fresh.prune(newest=10)
    assert fresh.steps() == [5, 10, 15]
    found = _newest(fresh)
    assert found is not None and found.step == 15


def test_a_bad_sector_is_damage(folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (5, 10):
        save(folder, step, _state())
    monkeypatch.setattr("trainer.checkpoint.manifest_file.open_regular", _refuse(errno.EIO, of="step_00000010"))
    warnings: list[str] = []
    found = _newest(folder, warnings.append)
    assert found is not None and found.step == 5
    assert len(warnings) == 1 and "is damaged (Input/output error); using step 5 instead" in warnings[0]


def test_a_checkpoint_of_another_version_ends_the_run_and_is_kept(folder: CheckpointFolder) -> None:
    for step in (5, 10):
        save(folder, step, _state())
    rewrite(folder.of_step(10), lambda values: values.update(format=3))
    with pytest.raises(CheckpointError, match="has format 3, this version reads 2; use the version that wrote it"):
        _newest(folder)
    fresh = CheckpointFolder(folder.path, keep=2)
    save(fresh, 7, _state())
    assert fresh.steps() == [5, 7, 10]


def test_an_intact_later_checkpoint_is_kept_and_not_counted(folder: CheckpointFolder) -> None:
    lasting = CheckpointFolder(folder.path, keep=2)
    for step in (5, 20, 10):  # 20 was written before the run resumed from an earlier step
        save(lasting, step, _state())
    assert lasting.steps() == [5, 10, 20]
    file = next(folder.of_step(20).glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    save(lasting, 15, _state())
    assert lasting.steps() == [10, 15]


def test_errors_after_the_rename_do_not_fail_the_save(
    folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (5, 10, 15):
        save(folder, step, _state())

    def refuse(folder: CheckpointFolder, step: int) -> None:
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(CheckpointFolder, "remove", refuse)
    saved = try_to_save(folder, 20, _state())
    assert saved.error is None and folder.steps() == [5, 10, 15, 20]
    assert "step_00000005: cannot be removed: Permission denied" in caplog.text


def test_a_save_is_reported_before_old_checkpoints_are_read(
    folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (5, 10, 15):
        save(folder, step, _state())
    may_go_on, prune = threading.Event(), CheckpointFolder.prune

    def wait_first(folder: CheckpointFolder, *, newest: int) -> None:
        may_go_on.wait(60)
        prune(folder, newest=newest)

    monkeypatch.setattr(CheckpointFolder, "prune", wait_first)
    saver = Saver(folder, Mesh.of_one())
    saver.start(20, _state(), {})
    saved = saver.wait()
    assert saved is not None and saved.error is None and folder.steps() == [5, 10, 15, 20]
    may_go_on.set()
    saver.close()
    assert folder.steps() == [10, 15, 20]


def test_out_of_memory_fails_the_save(folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("trainer.checkpoint.saver.write_files", refuse)
    saved = try_to_save(folder, 5, _state())
    assert isinstance(saved.error, ResourceError) and "step 5 not saved: out of memory" in str(saved.error)
    assert list(folder.path.iterdir()) == []


def _refuse(number: int, *, of: str) -> Callable[..., int]:
    """Return an `open_regular` that fails for files below a folder of this name."""

    def open_other(path: Path, flags: int, **options: bool) -> int:
        if of in str(path):
            raise OSError(number, os.strerror(number), str(path))
        return open_regular(path, flags, **options)

    return open_other


def test_a_checkpoint_under_the_name_of_another_step_is_refused(folder: CheckpointFolder) -> None:
    save(folder, 1, _state(1.0))
    save(folder, 2, _state(2.0)).path.rename(folder.of_step(9))
    warnings: list[str] = []
    found = _newest(folder, warnings.append)
    assert found is not None and found.step == 1
    assert "step_00000009: is damaged (its manifest is of step 2)" in warnings[0]


def test_a_damaged_checkpoint_is_replaced_when_its_step_comes_again(folder: CheckpointFolder) -> None:
    file = next(save(folder, 2, _state(2.0)).path.glob("*.safetensors"))
    file.write_bytes(b"")
    save(folder, 2, _state(3.0))
    assert float(load(folder, 2)["model.a"][0, 0]) == 3.0


def test_if_all_are_damaged_each_is_listed_and_the_run_does_not_start_over(folder: CheckpointFolder) -> None:
    for step in (1, 2):
        (save(folder, step, _state()).path / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError) as caught:
        _newest(folder)
    assert "step_00000001" in str(caught.value) and "step_00000002" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_error_about_a_missing_step_lists_the_existing_ones(folder: CheckpointFolder) -> None:
    save(folder, 3, _state())
    with pytest.raises(CheckpointError, match="has no checkpoint of step 9; it has 3"):
        find(folder, 9)


@pytest.mark.parametrize("when", ["tensors", "manifest", "rename"])
def test_a_failed_save_leaves_older_checkpoints_and_nothing_half_written(
    folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    save(folder, 1, _state())

    def refuse(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    target = {
        "tensors": "trainer.checkpoint.tensor_files.write_durably",
        "manifest": "trainer.checkpoint.saver.write_durably",
        "rename": "trainer.checkpoint.checkpoint_folder.Path.rename",
    }[when]
    with monkeypatch.context() as patch:
        patch.setattr(target, refuse)
        saved = try_to_save(folder, 2, _state())
    assert isinstance(saved.error, ResourceError)
    assert "step 2 not saved: No space left on device (it needs 0 MB, " in str(saved.error)
    assert [p.name for p in folder.path.iterdir()] == ["step_00000001"]
    find(folder, 1)


def test_other_disk_errors_name_the_file(folder: CheckpointFolder) -> None:
    folder.path.write_text("a file where the folder should be")
    saved = try_to_save(folder, 2, _state())
    assert type(saved.error) is ResourceError
    assert str(saved.error) == f"{folder.path}: step 2 not saved: File exists: {folder.path}"


def test_an_unexpected_error_is_raised_in_the_training_loop(
    folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.checkpoint.saver.manifest_text", lambda manifest: 1 // 0)
    saver = Saver(folder, Mesh.of_one())
    saver.start(1, _state(), {})
    with pytest.raises(ZeroDivisionError):
        saver.wait()


def test_leftovers_of_a_killed_save_are_not_checkpoints_and_are_removed(folder: CheckpointFolder) -> None:
    save(folder, 4, _state()).path.rename(folder.temporary(9))
    assert folder.steps() == []
    folder.clean()
    assert list(folder.path.iterdir()) == []


def test_a_later_damaged_one_does_not_displace_good_ones(tmp_path: Path) -> None:
    """A run that resumed from 20 because 30 is damaged saves at 21: the checkpoints it descends from must be kept."""
    folder = CheckpointFolder(tmp_path, keep=2)
    (save(folder, 30, _state()).path / "manifest.json").write_text("{")
    save(folder, 21, _state(2.0))
    assert folder.steps() == [21]


def test_an_old_checkpoint_that_cannot_be_removed_does_not_fail_the_save(
    folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2, 3):
        save(folder, step, _state())

    def busy(step: int) -> None:
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(folder, "remove", busy)
    save(folder, 4, _state())
    assert folder.steps() == [1, 2, 3, 4]
    assert "step_00000001: cannot be removed: Device or resource busy" in caplog.text


def test_names_and_content_are_flushed_before_the_rename(
    folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This order determines the state after a power failure."""
    order: list[str] = []
    sync, rename, fsync = folder_module.sync_folder, Path.rename, os.fsync

    def note_sync(path: Path) -> None:
        order.append(f"folder {path.name}")
        sync(path)

    def note_rename(path: Path, target: Path) -> Path:
        order.append(f"name {target.name}")
        return rename(path, target)

    def note_fsync(descriptor: int) -> None:
        order.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    monkeypatch.setattr(folder_module, "sync_folder", note_sync)
    monkeypatch.setattr(Path, "rename", note_rename)
    monkeypatch.setattr(os, "fsync", note_fsync)
    save(folder, 1, _state())
    assert order.pop(0) == f"folder {folder.path.parent.name}", "checkpoints/ itself is new"
    files = [entry for entry in order if entry.endswith((".safetensors", ".json"))]
    assert files == ["tensors-00000-00000.safetensors", "manifest.json"]
    steps = [entry for entry in order if entry.startswith(("folder", "name"))]
    assert steps == ["folder .tmp-step_00000001", "name step_00000001", "folder checkpoints"]
    assert order.index("manifest.json") < order.index("folder .tmp-step_00000001")
