"""Tests for the experts of a run on its ranks: by a file, by their load in its last checkpoint, equal on every rank."""

import json
import re
from contextlib import chdir
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.checkpoint_helpers import load
from tests.ranks import Ranks, mesh_here
from tests.tiny_training import config_of_text, kill_after, losses, train_here
from trainer.cli import main
from trainer.errors import TurnoutError
from trainer.parallel.expert_placement import ExpertPlacement, write_placement

SKEWED = "model.moe={num_experts: 6, d_ff: 16, balance: {coef: 0.0}}", "model.init_std=0.5"
"""A router of top 2 whose experts have very different loads."""


def _trained(folder: Path, placements: dict[str, str]) -> dict[str, str]:
    """Train a run of each name contiguously, then from a step on again with its placement; return its last screen."""
    mesh, screens = mesh_here(ep_size=2), {}
    for name, placement in placements.items():
        usual = [f"name={name}", "parallel.ep_size=2", "train.dtype=float64", "train.steps=6", *SKEWED]
        train_here(config_of_text(folder, *usual), mesh)
        mesh.world.all_gather_objects(None)
        if mesh.layout.rank == 0:
            kill_after(folder / "runs" / name, 3)
        mesh.world.all_gather_objects(None)
        screens[name] = train_here(config_of_text(folder, *usual, f"parallel.placement={placement}"), mesh)
    return screens


def _refusal(folder: Path) -> str | None:
    """Return why a run with a placement of this rank's own folder is refused."""
    mesh = mesh_here(ep_size=2)
    with chdir(folder / str(mesh.layout.rank)):
        try:
            train_here(config_of_text(folder, "parallel.ep_size=2", "parallel.placement=p.json"), mesh)
        except TurnoutError as error:
            return str(error)
    return None


def _moved(folder: Path) -> list[int]:
    """Return how many parts of the first weight of experts are in the files of the last checkpoint, by rank."""
    newest = max((folder / "checkpoints").iterdir())
    parts = json.loads((newest / "manifest.json").read_text())["tensors"]["model.blocks.1.ffn.experts.w_in"]["slices"]
    return [sum(part["file"].startswith(f"tensors-{rank:05d}-") for part in parts) for rank in range(2)]


def test_a_run_goes_on_with_its_experts_on_other_ranks(ranks: Ranks, tmp_path: Path) -> None:
    """Weights, moments and all else are those of a run that stays, and the busiest rank has fewer rows."""
    owners = ((0, 1, 0, 1, 1, 0), (1, 1, 0, 0, 1, 0))
    write_placement(tmp_path / "p.json", ExpertPlacement(num_ranks=2, owners=owners))
    placements = {"stays": "contiguous", "auto": "auto", "file": f"{tmp_path}/p.json"}
    screens = ranks.run(2, _trained, tmp_path, placements)[0]
    pattern = r"by their load in step 3: the busiest rank has (\S+) times .*: (\S+)\), at most 0.00%"
    said = re.search(pattern, screens["auto"])
    assert said is not None and 1 <= float(said[1]) < float(said[2]), screens["auto"]
    assert "placement contiguous -> auto" in screens["auto"] and "placement" not in screens["stays"]
    runs = tmp_path / "runs"
    stays: dict[str, Tensor] = load(runs / "stays" / "checkpoints", 6)
    assert any(name.startswith("optim.exp_avg_sq.") and "experts" in name for name in stays)
    assert _moved(runs / "stays") == [1, 1] and _moved(runs / "file") == [2, 2]
    for name in ("auto", "file"):
        assert dict(losses(runs / name)) == pytest.approx(dict(losses(runs / "stays")), rel=1e-12)
        moved = load(runs / name / "checkpoints", 6)
        assert moved.keys() == stays.keys()
        for key, tensor in stays.items():
            torch.testing.assert_close(moved[key], tensor, rtol=1e-9, atol=1e-12, msg=lambda m, key=key: f"{key}: {m}")


def test_ranks_with_different_files_are_refused(ranks: Ranks, tmp_path: Path) -> None:
    for rank, owner in enumerate(((0, 1, 0, 1), (0, 1, 1, 0))):
        (tmp_path / str(rank)).mkdir()
        write_placement(tmp_path / str(rank) / "p.json", ExpertPlacement(num_ranks=2, owners=(owner,) * 2))
    for problem in ranks.run(2, _refusal, tmp_path):
        assert problem is not None and problem.startswith("parallel.placement: "), problem
        assert problem.endswith("by their hashes; all ranks need the same file")


def test_a_file_that_does_not_fit_is_refused_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config_of_text(tmp_path)
    write_placement(tmp_path / "p.json", ExpertPlacement(num_ranks=2, owners=((0, 0, 1, 1),) * 2))
    for placement, ep_size, problem in (
        (
            f"{tmp_path}/p.json",
            4,
            r"p\.json is for 2 ranks \(ep_size\) with 0 copies each, and",
        ),
        (f"{tmp_path}/q.json", 2, r"q\.json: cannot be read as JSON"),
        ("automatic", 2, "parallel.placement: "),
    ):
        options = [f"parallel.placement={placement}", f"parallel.ep_size={ep_size}", "--nproc", str(ep_size)]
        with pytest.raises(SystemExit) as exit_:
            main(["launch", str(tmp_path / "tiny.yaml"), *options])
        assert exit_.value.code == 2
        assert re.search(problem, capsys.readouterr().err)
