"""A branch is a run of its own, complete or not there, and goes on as its parent did."""

import multiprocessing
import shutil
from pathlib import Path

import pytest

from tests.tiny_training import config_of, final_files, losses, train_here
from trainer import fault_injection
from trainer.checkpoint.ancestors import ancestors
from trainer.checkpoint.branch import Branch
from trainer.checkpoint.checkpoint_folder import CheckpointFolder
from trainer.checkpoint.identity import parent_from_record, recorded_id
from trainer.checkpoint.run_folder import RunFolder
from trainer.config.dump import dump
from trainer.errors import CheckpointError, ConfigError, ResourceError
from trainer.fault_injection import Fault


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with a finished run, `base`, of 12 steps."""
    folder = tmp_path_factory.mktemp("branch")
    (folder / "text.txt").write_text("It was a bright cold day in April, and the clocks were striking. " * 60)
    train_here(config_of(folder, "name=base", _text(folder)))
    return folder


def _text(folder: Path) -> str:
    return f"data.sources=[{{kind: text, path: {folder}/text.txt}}]"


def _branch(folder: Path, name: str, *, of: str = "base", step: int | None = None) -> Path:
    made = Branch(
        parent=RunFolder(folder / "runs" / of),
        step=step,
        name=name,
        config=dump(config_of(folder, f"name={name}", _text(folder))),
    )
    made.check(folder / "runs" / name)
    made.make(folder / "runs" / name)
    assert made.is_made(folder / "runs" / name)
    return folder / "runs" / name


def test_a_branch_goes_on_as_its_parent_did(workplace: Path) -> None:
    base, run = workplace / "runs/base", _branch(workplace, "same", step=6)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_00000006"]
    assert losses(run) == losses(base)[:6], "the log up to the checkpoint"
    assert not list(run.parent.glob(".*"))
    said = train_here(config_of(workplace, "name=same", _text(workplace)))
    assert "branches off" not in said and "resuming from" in said and "warning" not in said
    assert losses(run) == losses(base) and final_files(run) == final_files(base)
    (parent,) = ancestors(RunFolder(run))
    assert (parent.text, parent.id) == ("base at step 6 (branch)", recorded_id(RunFolder(base)))
    assert recorded_id(RunFolder(run)) != parent.id
    record = CheckpointFolder(run / "checkpoints").manifest(12).run
    of = parent_from_record(record["parent"])
    assert record["id"] == recorded_id(RunFolder(run)) and of is not None and of.id == parent.id


def test_neither_run_can_harm_the_other(workplace: Path) -> None:
    run = _branch(workplace, "apart")
    (mine,) = run.glob("checkpoints/*/*.safetensors")
    (theirs,) = (workplace / "runs/base/checkpoints/step_00000012").glob("*.safetensors")
    assert not mine.samefile(theirs)
    theirs_before, base = workplace / "kept", CheckpointFolder(workplace / "runs/base/checkpoints")
    shutil.copytree(base.of_step(12), theirs_before)
    base.remove(12)
    assert CheckpointFolder(run / "checkpoints").is_intact(12)
    theirs_before.rename(base.of_step(12))
    mine.write_bytes(b"")
    assert base.is_intact(12)


def test_a_branch_of_a_branch_that_has_not_trained_knows_both(workplace: Path) -> None:
    _branch(workplace, "child", step=9)
    run = _branch(workplace, "grandchild", of="child")
    before = recorded_id(RunFolder(run))
    train_here(config_of(workplace, "name=grandchild", _text(workplace)))
    assert recorded_id(RunFolder(run)) == before, "it does not branch off again from its grandparent"
    assert [one.text for one in ancestors(RunFolder(run))] == ["child at step 9 (branch)", "base at step 9 (branch)"]


def test_of_a_damaged_checkpoint_no_branch_is_made(workplace: Path, caplog: pytest.LogCaptureFixture) -> None:
    _branch(workplace, "damaged", step=9)
    newest = workplace / "runs/damaged/checkpoints/step_00000012"
    shutil.copytree(workplace / "runs/base/checkpoints/step_00000012", newest)
    (file,) = newest.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    with pytest.raises(CheckpointError, match=r"runs/damaged/checkpoints/step_00000012/.* is damaged \(its SHA-256"):
        _branch(workplace, "never", of="damaged", step=12)
    assert not (workplace / "runs/never").exists() and not list((workplace / "runs").glob(".*"))
    older = _branch(workplace, "older", of="damaged")
    assert CheckpointFolder(older / "checkpoints").steps() == [9] and "using step 9 instead" in caplog.text
    file.unlink()
    with pytest.raises(CheckpointError, match=r"damaged/checkpoints/step_00000012/tensors.* is damaged \(there is no"):
        _branch(workplace, "never", of="damaged", step=12)
    shutil.rmtree(workplace / "runs/damaged/checkpoints/step_00000009")
    with pytest.raises(CheckpointError, match=r"step_00000012/tensors"):
        _branch(workplace, "never", of="damaged")


def test_what_is_there_and_what_is_not_is_refused(workplace: Path) -> None:
    (workplace / "runs/link").symlink_to("nowhere")
    for name in ("base", "link"):
        with pytest.raises(ConfigError, match=f"runs/{name}: exists; choose another name"):
            _branch(workplace, name)
    with pytest.raises(CheckpointError, match=r"has no checkpoint of step 7; it has 3, 6, 9, 12"):
        _branch(workplace, "never", step=7)
    (workplace / "runs/empty").mkdir()
    with pytest.raises(CheckpointError, match=r"runs/empty/checkpoints: has no checkpoint; train first"):
        _branch(workplace, "never", of="empty")
    made = Branch(parent=RunFolder(workplace / "runs/empty"), step=None, name="base", config="")
    assert not made.is_made(workplace / "runs/base") and not made.is_made(workplace / "runs/nowhere")


POINTS = ["branch.checkpoint_copied", "branch.written"]


@pytest.mark.parametrize("point", POINTS)
def test_a_full_disk_leaves_nothing(workplace: Path, point: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fault_injection, "_PLANNED", [Fault(point, "full", 1)])
    with pytest.raises(ResourceError, match=r"runs/full: cannot be written: No space left on device"):
        _branch(workplace, "full")
    assert not (workplace / "runs/full").exists() and not list((workplace / "runs").glob(".*"))


def _killed(folder: Path, point: str) -> None:
    fault_injection._PLANNED.append(Fault(point, "kill", 1))
    _branch(folder, f"killed_{POINTS.index(point)}")


@pytest.mark.parametrize("point", POINTS)
def test_a_kill_leaves_nothing_of_its_name(workplace: Path, point: str) -> None:
    name = f"killed_{POINTS.index(point)}"
    process = multiprocessing.get_context("fork").Process(target=_killed, args=(workplace, point))
    process.start()
    process.join(60)
    assert process.exitcode == -9 and not (workplace / "runs" / name).exists()
    assert CheckpointFolder(_branch(workplace, name) / "checkpoints").is_intact(12)
    assert not list((workplace / "runs").glob(".*"))
