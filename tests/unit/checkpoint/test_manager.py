"""Checkpoints: whole or absent, verified, newest undamaged first."""

import json
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch

from trainer.checkpoint.compatible import check_fits
from trainer.checkpoint.manager import Checkpointer
from trainer.checkpoint.state import Slice, TrainState
from trainer.errors import CheckpointError, ResourceError


def _state(fill: float = 1.0) -> TrainState:
    tensors = {
        "model.a": torch.full((3, 2), fill),
        "model.b": torch.arange(5, dtype=torch.int64),
        "optim.a": torch.tensor(2.5, dtype=torch.float64),
        "model.c": torch.zeros(0, 4),
    }
    return TrainState(slices={n: Slice.whole(t) for n, t in tensors.items()}, values={"optimizer_steps": 7, "x": 0.1})


@pytest.fixture
def checkpointer(tmp_path: Path) -> Checkpointer:
    return Checkpointer(tmp_path / "checkpoints", keep=3)


def _silent(line: str) -> None:
    raise AssertionError(f"unexpected warning: {line}")


def test_a_state_comes_back_equal(checkpointer: Checkpointer) -> None:
    path = checkpointer.save(40, _state(), {"position": 640})
    assert path.name == "step_00000040"
    loaded = checkpointer.load_newest(warn=_silent)
    assert loaded is not None and loaded.path == path
    assert loaded.info["step"] == 40 and loaded.info["position"] == 640
    assert loaded.state.values == {"optimizer_steps": 7, "x": 0.1}
    for name, part in _state().slices.items():
        assert torch.equal(loaded.state.slices[name].tensor, part.tensor), name
        assert loaded.state.slices[name].tensor.dtype == part.tensor.dtype
        assert loaded.state.slices[name].global_shape == tuple(part.tensor.shape)


def test_no_checkpoint_is_none_and_not_an_error(checkpointer: Checkpointer) -> None:
    assert checkpointer.load_newest(warn=_silent) is None


def test_only_the_newest_are_kept(checkpointer: Checkpointer) -> None:
    for step in (5, 10, 15, 20):
        checkpointer.save(step, _state(), {})
    assert checkpointer.steps() == [10, 15, 20]
    assert sorted(p.name for p in checkpointer.folder.iterdir()) == ["step_00000010", "step_00000015", "step_00000020"]


def test_the_number_in_the_name_counts_and_not_the_time(checkpointer: Checkpointer) -> None:
    for step in (5, 10):
        checkpointer.save(step, _state(step), {})
    os.utime(checkpointer.path(5), (2e9, 2e9))
    loaded = checkpointer.load_newest(warn=_silent)
    assert loaded is not None and loaded.info["step"] == 10


def test_large_states_are_split_over_files(checkpointer: Checkpointer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.checkpoint.format._FILE_SIZE_BYTES", 30)
    path = checkpointer.save(1, _state(), {})
    assert len(list(path.glob("*.safetensors"))) == 3
    loaded = checkpointer.load(1)
    assert torch.equal(loaded.state.slices["model.a"].tensor, torch.ones(3, 2))


def _files(path: Path) -> list[Path]:
    return sorted(path.iterdir())


def test_every_flipped_byte_is_noticed(checkpointer: Checkpointer) -> None:
    path = checkpointer.save(1, _state(), {})
    for file in _files(path):
        good = file.read_bytes()
        for position in range(0, len(good), max(1, len(good) // 60)):
            bad = bytearray(good)
            bad[position] ^= 0x10
            file.write_bytes(bad)
            with pytest.raises(CheckpointError, match=r"is damaged|has format"):
                checkpointer.load(1)
        file.write_bytes(good)
    checkpointer.load(1)


@pytest.mark.parametrize("harm", ["truncate", "empty", "delete", "grow"])
def test_every_file_that_is_cut_or_gone_is_noticed(checkpointer: Checkpointer, harm: str) -> None:
    path = checkpointer.save(1, _state(), {})
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
        if harm == "grow" and file.name == "manifest.json":
            checkpointer.load(1)  # white space behind JSON says nothing else
        else:
            with pytest.raises(CheckpointError):
                checkpointer.load(1)
        file.write_bytes(good)


def test_a_damaged_newest_is_passed_over_with_a_warning(checkpointer: Checkpointer) -> None:
    checkpointer.save(1, _state(1.0), {})
    file = next(checkpointer.save(2, _state(2.0), {}).glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-3])
    warnings: list[str] = []
    loaded = checkpointer.load_newest(warn=warnings.append)
    assert loaded is not None and loaded.info["step"] == 1
    assert len(warnings) == 1 and "step_00000002" in warnings[0] and "resuming from step 1" in warnings[0]


def test_a_damaged_checkpoint_is_replaced_when_its_step_comes_again(checkpointer: Checkpointer) -> None:
    file = next(checkpointer.save(2, _state(2.0), {}).glob("*.safetensors"))
    file.write_bytes(b"")
    checkpointer.save(2, _state(3.0), {})
    assert float(checkpointer.load(2).state.slices["model.a"].tensor[0, 0]) == 3.0


def test_all_damaged_is_an_error_that_lists_each_and_never_a_fresh_start(checkpointer: Checkpointer) -> None:
    for step in (1, 2):
        (checkpointer.save(step, _state(), {}) / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError) as caught:
        checkpointer.load_newest(warn=_silent)
    assert "step_00000001" in str(caught.value) and "step_00000002" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_step_names_those_there_are(checkpointer: Checkpointer) -> None:
    checkpointer.save(3, _state(), {})
    with pytest.raises(CheckpointError, match="has no checkpoint of step 9; it has 3"):
        checkpointer.load(9)


@pytest.mark.parametrize("when", ["tensors", "manifest", "rename"])
def test_a_failed_save_leaves_older_checkpoints_and_nothing_half_written(
    checkpointer: Checkpointer, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    checkpointer.save(1, _state(), {})

    def refuse(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    target = {
        "tensors": "trainer.checkpoint.format._write_durably",
        "manifest": "trainer.checkpoint.format._manifest_hash",
        "rename": "trainer.checkpoint.manager.Path.rename",
    }[when]
    with monkeypatch.context() as patch:
        patch.setattr(target, refuse)
        with pytest.raises(ResourceError, match=r"step 2 not saved: No space left on device \(it needs"):
            checkpointer.save(2, _state(), {})
    assert [p.name for p in checkpointer.folder.iterdir()] == ["step_00000001"]
    checkpointer.load(1)


def test_what_a_killed_save_left_is_never_taken_for_a_checkpoint_and_is_cleaned(checkpointer: Checkpointer) -> None:
    path = checkpointer.save(4, _state(), {})
    path.rename(checkpointer.folder / ".tmp-step_00000009")
    assert checkpointer.steps() == []
    checkpointer.clean()
    assert list(checkpointer.folder.iterdir()) == []


def test_a_manifest_cannot_name_a_file_outside_its_folder(checkpointer: Checkpointer, tmp_path: Path) -> None:
    outside = tmp_path / "outside.safetensors"
    safetensors.torch.save_file({"model.a": torch.zeros(1)}, outside)
    path = checkpointer.save(1, _state(), {})
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["../../outside.safetensors"] = {"size_bytes": outside.stat().st_size, "sha256": "0" * 64}
    del manifest["manifest_sha256"]
    from trainer.checkpoint.format import _manifest_hash

    manifest["manifest_sha256"] = _manifest_hash(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"step_00000001.outside\.safetensors: cannot be read"):
        checkpointer.load(1)


def test_a_state_of_another_model_is_refused_by_name_and_shape(tmp_path: Path) -> None:
    mine = _state()
    other = TrainState(slices={**mine.slices, "model.a": Slice.whole(torch.zeros(3, 4))}, values=mine.values)
    with pytest.raises(CheckpointError, match=r"model\.a is \[3, 4\] in it and \[3, 2\] in this model"):
        check_fits(tmp_path, other, mine)
    fewer = TrainState(slices={n: s for n, s in mine.slices.items() if n != "model.b"}, values=mine.values)
    with pytest.raises(CheckpointError, match=r"model\.b is not in it"):
        check_fits(tmp_path, fewer, mine)
    with pytest.raises(CheckpointError, match=r"it has model\.b, which this model does not"):
        check_fits(tmp_path, mine, fewer)
    wider = TrainState(
        slices={**mine.slices, "model.a": Slice.whole(torch.zeros(3, 2, dtype=torch.float64))}, values=mine.values
    )
    with pytest.raises(CheckpointError, match=r"torch\.float64 in it and torch\.float32"):
        check_fits(tmp_path, wider, mine)
    check_fits(tmp_path, mine, mine)


def test_a_later_damaged_checkpoint_does_not_push_the_good_ones_out(tmp_path: Path) -> None:
    """Resumed from 20 because 30 is damaged, the run saves at 21: what is kept must be what it came from."""
    checkpointer = Checkpointer(tmp_path, keep=1)
    (checkpointer.save(30, _state(), {}) / "manifest.json").write_text("{")
    checkpointer.save(21, _state(2.0), {})
    assert checkpointer.steps() == [21]
    assert checkpointer.load(21).info["step"] == 21


def test_an_old_checkpoint_that_cannot_be_removed_does_not_fail_the_save(
    checkpointer: Checkpointer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2, 3):
        checkpointer.save(step, _state(), {})

    def busy(path: Path) -> None:
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(checkpointer, "_remove", busy)
    checkpointer.save(4, _state(), {})
    assert checkpointer.steps() == [1, 2, 3, 4]
    assert "step_00000001: cannot be removed: Device or resource busy" in caplog.text


def test_a_disk_too_full_for_the_folder_itself_is_the_same_error(
    checkpointer: Checkpointer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(ResourceError, match="step 1 not saved: No space left on device"):
        checkpointer.save(1, _state(), {})
