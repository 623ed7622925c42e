"""Law: a run goes on in another text as it says, and resumes there bit for bit, on one rank and on two."""

import json
import shutil
from pathlib import Path

import pytest

from tests.ranks import Ranks, mesh_here
from tests.tiny_training import config_of, final_files, kill_after, losses, train_here
from tests.unit.checkpoint.test_manifest import rewrite
from trainer.checkpoint.checkpoint_folder import CheckpointFolder
from trainer.errors import CheckpointError, DataError

PROSE = "It was a bright cold day in April, and the clocks were striking. Winston slipped through the doors. "


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with two texts and the run `base`, killed after step 6 on the first one."""
    folder = tmp_path_factory.mktemp("changed")
    (folder / "books").mkdir()
    (folder / "books/one.txt").write_text(PROSE * 8)
    (folder / "books/two.txt").write_text("".join(f"{i} plus {i} is {2 * i}. " for i in range(90)))
    (folder / "other.txt").write_text("The train waits at the signal until the turnout is set. " * 20)
    train_here(config_of(folder, "name=base", SOURCES.format(folder=folder)))
    kill_after(folder / "runs/base", 6)
    return folder


BOOKS = "{{kind: text, path: {folder}/books, domain: books}}"
SOURCES = f"data.sources=[{{{{kind: text, path: {{folder}}/other.txt, domain: signal}}}}, {BOOKS}]"
"""The folder is the second source, so that its domain keeps its order although the first one is left out later."""
FOLDER = f"data.sources=[{BOOKS}]"


def _copy_of_base(folder: Path, name: str) -> Path:
    shutil.copytree(folder / "runs/base", folder / "runs" / name)
    (folder / "runs" / name / "run_id").unlink()  # not a branch
    (folder / "runs" / name / "origin.json").unlink()
    return folder / "runs" / name


def _train(folder: Path, name: str, how: str, world_size: int = 1) -> str:
    overrides = [f"name={name}", FOLDER.format(folder=folder), f"data.changed={how}", f"parallel.ep_size={world_size}"]
    return train_here(config_of(folder, *overrides), mesh_here(ep_size=world_size) if world_size > 1 else None)


@pytest.mark.parametrize("how", ["continue", "restart"])
def test_a_run_killed_after_the_change_of_text_ends_as_if_it_had_not_been(
    ranks: Ranks, workplace: Path, how: str
) -> None:
    whole, killed, pair = (_copy_of_base(workplace, f"{kind}_{how}") for kind in ("whole", "killed", "pair"))
    said = _train(workplace, whole.name, how)
    assert f"data.changed: {how}: other text from row 36 of the run on" in said
    _train(workplace, killed.name, how)
    kill_after(killed, 9)  # a checkpoint of the new text
    assert "other text" not in _train(workplace, killed.name, how), "the change is behind it"
    kill_after(killed, 6)  # before any checkpoint of the new text: the change happens again, at the same row
    assert "other text from row 36" in _train(workplace, killed.name, how)
    assert losses(killed) == losses(whole) and len(losses(whole)) == 12
    assert final_files(killed) == final_files(whole)

    ranks.run(2, _train, workplace, pair.name, how, 2)
    undisturbed = final_files(pair)
    kill_after(pair, 9)
    ranks.run(2, _train, workplace, pair.name, how, 2)
    assert final_files(pair) == undisturbed
    assert [loss for _, loss in losses(pair)] == pytest.approx([loss for _, loss in losses(whole)], rel=1e-5)
    record = json.loads((pair / "checkpoints/step_00000012/manifest.json").read_text())["run"]
    assert record["position"] == 72 and record["text"]["start"] == 36
    assert record["text"] == json.loads((whole / "checkpoints/step_00000012/manifest.json").read_text())["run"]["text"]
    domain = record["text"]["domains"]["books"]
    assert (domain["key"], domain["first_visit"] > 0) == ((1, True) if how == "continue" else (0, False))


def test_a_run_that_has_read_nothing_may_begin_with_any_text(workplace: Path) -> None:
    run = workplace / "runs/begun"
    begin = [f"name={run.name}", f"init_from.run={workplace}/runs/base", "train.steps=1"]
    train_here(config_of(workplace, *begin, SOURCES.format(folder=workplace)))
    kill_after(run, 0)
    train_here(config_of(workplace, *begin, FOLDER.format(folder=workplace)))
    (domain,) = CheckpointFolder(run / "checkpoints").manifest(1).run["text"]["domains"].values()  # type: ignore
    assert domain["key"] == 0, "as a new run on this text"


def test_other_text_is_refused_with_the_option_that_allows_it(workplace: Path) -> None:
    run = _copy_of_base(workplace, "refused")
    with pytest.raises(DataError) as caught:
        _train(workplace, run.name, "null")
    assert "; restore the files, or set data.changed: continue (each domain goes on where it was) or restart" in str(
        caught.value
    )
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step_00000003", "step_00000006"]


MALFORMED = [[], {"start": 37}, {"start": -1}, {"domains": {"books": {"key": "1"}}}, "\x1b[2J" * 99]


@pytest.mark.parametrize("text", MALFORMED)
def test_a_malformed_order_is_refused_in_one_line(workplace: Path, text: object) -> None:
    run = _copy_of_base(workplace, "malformed")
    try:
        for path in run.glob("checkpoints/*"):
            rewrite(path, lambda values: values["run"].update(text=text))
        with pytest.raises(CheckpointError, match=r"step_00000006: is invalid: run\.text is ") as caught:
            _train(workplace, run.name, "continue")
        assert str(caught.value).isprintable() and len(str(caught.value)) < 400
    finally:
        shutil.rmtree(run)


def test_a_checkpoint_of_an_earlier_version_goes_on_too(workplace: Path) -> None:
    run = _copy_of_base(workplace, "earlier")
    for path in run.glob("checkpoints/*"):
        rewrite(path, lambda values: values["run"].pop("text"))
    assert "books: changed, goes on in the order of the new text" in _train(workplace, run.name, "continue")
    assert len(losses(run)) == 12
