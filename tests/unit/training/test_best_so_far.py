"""The best checkpoint of a run: saved when evaluated, kept, named, the same after a kill or elsewhere."""

import json
import math
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.checkpoint_helpers import save
from tests.ranks import Ranks, mesh_here
from tests.tiny_training import config_of_text, final_files, kill_after, train_here
from trainer.checkpoint.best import BestCheckpoint
from trainer.checkpoint.checkpoint_folder import CheckpointFolder
from trainer.checkpoint.config import BestConfig
from trainer.checkpoint.state import Slice, TrainState
from trainer.cli import main
from trainer.distributed.mesh import Mesh
from trainer.errors import ConfigError
from trainer.training.best_so_far import BestSoFar
from trainer.training.resume import check_best

OVERRIDES = ["eval.every=5", "checkpoint.every=4", "checkpoint.keep=2", "eval.max_tokens_per_domain=16"]
BEST = [*OVERRIDES, "checkpoint.best={metric: eval/loss, mode: max}"]
"""The loss is greatest at the first evaluation, when no save is due, and keeping two removes what is saved then."""


def _steps(run: Path) -> list[int]:
    return CheckpointFolder(run / "checkpoints").steps()


def _evaluations(run: Path) -> dict[int, float]:
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {record["step"]: record["eval/loss"] for record in records if "eval/loss" in record}


def _exit_code(arguments: list[str]) -> Any:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return ended.value.code


def _best(run: Path) -> BestCheckpoint:
    found = CheckpointFolder(run / "checkpoints").best()
    assert found is not None
    return found


def test_the_best_is_the_first_least_or_greatest_finite_value() -> None:
    values = [3.0, math.nan, 2.0, 2.0, math.inf, -math.inf, 2.5, 1.0]
    least, most = BestSoFar(BestConfig(metric="eval/loss")), BestSoFar(BestConfig(metric="eval/loss", mode="max"))
    assert [least.note(step, {"eval/loss": value}) for step, value in enumerate(values)] == [
        True, False, True, False, False, False, False, True,
    ]  # fmt: skip
    assert sum(most.note(step, {"eval/loss": value}) for step, value in enumerate(values)) == 1
    assert not least.note(9, {"eval/other": 0.0}) and not BestSoFar(None).note(1, {"eval/loss": 0.0})
    assert (
        BestConfig(metric="eval/arc/acc").direction == "max" and BestConfig(metric="eval/a/ndcg@10").direction == "max"
    )


def test_a_best_checkpoint_that_could_not_be_saved_is_none() -> None:
    best = BestSoFar(BestConfig(metric="eval/loss"))
    best.note(4, {"eval/loss": 2.0})
    best.note(8, {"eval/loss": 1.0})
    best.note_lost(8)
    assert best.found is not None and best.found.step == 4
    assert best.note(12, {"eval/loss": 1.5})
    assert best.note(16, {"eval/loss": 1.2})
    best.note_lost(12)  # its save ends once the next evaluation was better
    best.note_lost(16)
    assert best.found is not None and best.found.step == 4


@pytest.mark.parametrize(
    "changes",
    [{"step": -1}, {"step": True}, {"value": math.nan}, {"value": "1"}, {"mode": "x"}, {"metric": 1}, {"a": 1}],
)
def test_a_malformed_record_is_none(changes: dict[str, Any]) -> None:
    record = BestCheckpoint(metric="eval/loss", mode="min", value=1.5, step=3).record()
    assert BestCheckpoint.of({"best": record}) is not None
    assert BestCheckpoint.of({"best": {**record, **changes}}) is None


def test_the_best_checkpoint_is_saved_kept_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, plain = tmp_path / "runs/tiny", tmp_path / "runs/plain"
    screen = train_here(config_of_text(tmp_path, *BEST))
    evaluations = _evaluations(run)
    best = max(evaluations, key=lambda step: evaluations[step])
    assert best == 5 and _best(run) == BestCheckpoint(metric="eval/loss", mode="max", value=evaluations[5], step=5)
    assert _steps(run) == [5, 8, 12]
    assert "the best eval/loss so far" in screen
    train_here(config_of_text(tmp_path, *OVERRIDES, "name=plain"))
    assert final_files(plain) == final_files(run) and _steps(plain) == [8, 12], "nothing else changes"
    assert "best" not in json.loads((plain / "checkpoints/step_00000012/manifest.json").read_text())["run"]

    assert _exit_code(["checkpoint", "list", str(run)]) == 0
    marked = [line for line in capsys.readouterr().out.splitlines() if line.endswith("complete, the best eval/loss")]
    assert len(marked) == 1 and marked[0].startswith(f"step_{best:08d}")
    assert _exit_code(["checkpoint", "prune", str(run), "--keep", "1"]) == 0
    assert _steps(run) == [5, 12]
    capsys.readouterr()
    assert _exit_code(["eval", str(run), "--json", "--step", "best"]) == 0
    evaluated = json.loads(capsys.readouterr().out)
    assert evaluated["step"] == best and evaluated["eval/loss"] == pytest.approx(evaluations[best], rel=1e-6)
    assert _exit_code(["eval", str(plain), "--step", "best"]) == 4
    assert "no checkpoint of" in capsys.readouterr().err


def test_a_kill_between_evaluation_and_save_changes_nothing(tmp_path: Path) -> None:
    run, config = tmp_path / "runs/tiny", config_of_text(tmp_path, *BEST)
    train_here(config_of_text(tmp_path, *BEST, "checkpoint.keep=20"))
    files, best = final_files(run), _best(run)
    kill_after(run, 8)  # the record is that of the newest checkpoint
    train_here(config)
    assert (final_files(run), _best(run), _steps(run)) == (files, best, [5, 8, 12])
    shutil.rmtree(run / "checkpoints/step_00000005")
    kill_after(run, 8)  # as if someone had removed it
    assert "of step 5, is not in this folder, or not whole" in train_here(config)
    assert (final_files(run), _best(run).step) == (files, 10)


def test_a_best_checkpoint_that_is_cut_off_is_forgotten(tmp_path: Path) -> None:
    folder, said = CheckpointFolder(tmp_path), list[str]()
    state = TrainState(slices={"model.a": Slice.whole(torch.ones(4))})
    best = BestCheckpoint(metric="eval/loss", mode="min", value=1.0, step=3)
    path = save(folder, 3, state, {"best": best.record()}).path
    run: Any = SimpleNamespace(
        best=BestSoFar(BestConfig(metric="eval/loss")),
        mesh=Mesh.of_one(),
        saver=SimpleNamespace(folder=folder),
        console=SimpleNamespace(message=said.append),
    )
    run.best.restore({"best": best.record()})
    check_best(run)
    assert run.best.found == best and not said
    (tensors,) = path.glob("*.safetensors")
    os.truncate(tensors, tensors.stat().st_size - 1)
    check_best(run)
    assert run.best.found is None and len(said) == 1


def test_an_evaluation_whose_save_was_killed_is_taken_again(tmp_path: Path) -> None:
    run, config = tmp_path / "runs/tiny", config_of_text(tmp_path, *BEST)
    train_here(config_of_text(tmp_path, *BEST, "checkpoint.keep=20"))
    files, best = final_files(run), _best(run)
    kill_after(run, 4)  # the evaluation after step 5 is in metrics.jsonl, and its checkpoint is not there
    train_here(config)
    assert (final_files(run), _best(run), _steps(run)) == (files, best, [5, 8, 12])


def _train_on_ranks(folder: Path, overrides: list[str], ep_size: int) -> None:
    dispatcher = "all_to_all" if ep_size > 1 else "local"
    layout = [f"parallel.ep_size={ep_size}", f"parallel.dispatcher.kind={dispatcher}"]
    train_here(config_of_text(folder, *BEST, *overrides, *layout), mesh_here(ep_size=ep_size))


def test_the_best_is_found_and_kept_in_any_layout(ranks: Ranks, tmp_path: Path) -> None:
    run = tmp_path / "runs/tiny"
    double = "train.dtype=float64"
    ranks.run(2, _train_on_ranks, tmp_path, ["train.steps=7", double], 2)
    best = _best(run)
    train_here(config_of_text(tmp_path, *BEST, double))
    assert _steps(run) == [5, 8, 12] and _best(run) == best
    train_here(config_of_text(tmp_path, *OVERRIDES, double, "train.steps=14", "checkpoint.best=eval/loss"))
    assert _best(run).step == 14 and _best(run).mode == "min", "another question begins anew"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("checkpoint.best=eval/accuracy", "eval/accuracy is not among the results|is better is not known"),
        ("checkpoint.best=eval/ema/loss", "there is none; set train.ema"),
        ("checkpoint.best={metric: eval/expert_domain_mi}", "is not known; give mode"),
        ("checkpoint.best=loss", "checkpoint.best"),
    ],
)
def test_a_metric_that_no_evaluation_has_is_refused(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        config_of_text(tmp_path, override)
    assert re.search(message, str(refused.value)), refused.value
