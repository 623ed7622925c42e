"""What a run is made of: the same on all ranks, and what its checkpoint says it was."""

import io
import threading
import time
from pathlib import Path

import pytest
import torch

from tests.ranks import Ranks, mesh_here
from trainer.build import Run, build_run
from trainer.checkpoint import shared
from trainer.checkpoint.run_folder import RunFolder
from trainer.config.loader import load
from trainer.distributed.mesh import Mesh
from trainer.errors import ConfigError, TurnoutError
from trainer.experiment import ExperimentConfig
from trainer.metrics.console import Console

CONFIG = """\
name: tiny
model: {num_layers: 1, d_model: 8, num_heads: 2, seq_len: 8, d_ff: 8, moe: {num_experts: 2, d_ff: 8}}
train: {steps: 10, global_batch_size: 4}
schedule: {kind: warmup_cosine, warmup_steps: 0}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A place with a config and a text; its runs are in `runs`."""
    text = "It was a bright cold day in April, and the clocks were striking. " * 50
    (tmp_path / "text.txt").write_text(text)
    (tmp_path / "other.txt").write_text(text.replace("cold", "warm"))
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    return tmp_path


def _config(folder: Path, overrides: list[str]) -> ExperimentConfig:
    source = f"data.sources=[{{kind: text, path: {folder}/text.txt}}]"
    places = [source, f"data.cache_dir={folder}/cache", f"runs_dir={folder}/runs"]
    return load(folder / "tiny.yaml", [*places, *overrides], ExperimentConfig)


def _build(folder: Path, overrides: list[str], mesh: Mesh | None = None) -> tuple[Run, list[str]]:
    """Return a run and its warnings."""
    config, screen = _config(folder, overrides), io.StringIO()
    where = RunFolder(Path(config.runs_dir) / config.name)
    run = build_run(config, where, Console(0, file=screen), mesh or Mesh.of_one(), torch.device("cpu"))
    said = [line.removeprefix("warning: ") for line in screen.getvalue().splitlines() if line.startswith("warning")]
    return run, said


# --- ranks that were not given the same -------------------------------------------------------------------------------


def _error_here(folder: Path, overrides: list[list[str]], visible_s: float = 0.1) -> str | None:
    """Return how making the run ends on this rank, each rank with its own overrides."""
    shared.VISIBLE_S = visible_s
    mesh = mesh_here()
    try:
        _build(folder, overrides[mesh.layout.rank], mesh)
    except TurnoutError as error:
        return f"{type(error).__name__}: {error}"
    return None


def test_a_config_that_is_another_one_on_some_ranks_is_refused_by_key_value_and_rank(
    ranks: Ranks, folder: Path
) -> None:
    other = ["schedule.peak_lr=0.002", "eval.every=7"]
    errors = ranks.run(3, _error_here, folder, [[], other, other])
    assert len(set(errors)) == 1 and errors[0].startswith("ConfigError: schedule.peak_lr: 0.001 on rank 0 (host ")
    first, second = errors[0].splitlines()
    assert "), 0.002 on ranks 1 and 2 (host " in first and first.endswith("all ranks need the same config and versions")
    assert second.startswith("eval.every: 200 on rank 0 (host ") and "), 7 on ranks 1 and 2 (host " in second


def test_hosts_may_have_their_files_in_other_places(ranks: Ranks, folder: Path) -> None:
    (folder / "mount").symlink_to(folder)
    moved = ["data.sources.0.path=text.txt", "data.cache_dir=cache", "runs_dir=runs"]
    own = [word.replace("=", f"={folder}/mount/") for word in moved]
    assert ranks.run(2, _error_here, folder, [[], own]) == [None, None]
    assert [path.name for path in (folder / "runs/tiny").glob(".start*")] == []


def test_ranks_that_read_other_text_are_refused(ranks: Ranks, folder: Path) -> None:
    own = [f"data.sources.0.path={folder}/other.txt"]
    errors = ranks.run(2, _error_here, folder, [[], own])
    assert all(error.startswith("DataError: data.fingerprint: ") for error in errors)
    assert all(error.endswith("; all ranks must read the same text (data.sources)") for error in errors)


def test_a_run_folder_that_a_rank_does_not_see_is_refused_at_the_start(ranks: Ranks, folder: Path) -> None:
    (folder / "own/tiny").mkdir(parents=True)
    (folder / "own/tiny/.start").write_text("of another run")
    first, second = ranks.run(2, _error_here, folder, [[], [f"runs_dir={folder}/own"]])
    assert second.startswith(f"ConfigError: rank 1: runs_dir: {folder}/own/tiny on host ")
    assert f" is not the folder that rank 0 writes into, {folder}/runs/tiny on host " in second
    assert second.endswith("; use a folder on a file system that all nodes share")
    assert first.startswith("ElsewhereError: rank 1: runs_dir: ")
    assert list((folder / "runs/tiny").iterdir()) == [], "and nothing was begun"


def _error_with_a_late_folder(folder: Path) -> str | None:
    def appear() -> None:
        time.sleep(0.3)
        (folder / "late").symlink_to(folder / "runs")

    if mesh_here().layout.rank == 1:
        threading.Thread(target=appear, daemon=True).start()
    return _error_here(folder, [[], [f"runs_dir={folder}/late"]], 20.0)


def test_a_run_folder_that_appears_late_is_waited_for(ranks: Ranks, folder: Path) -> None:
    assert ranks.run(2, _error_with_a_late_folder, folder) == [None, None]


def _error_of_groups() -> str | None:
    from torch.distributed import get_rank

    try:
        mesh_here(ep_size=1 + get_rank())
    except ConfigError as error:
        return str(error)
    return None


def test_ranks_with_other_groups_are_refused_before_they_wait_for_each_other(ranks: Ranks) -> None:
    errors = ranks.run(2, _error_of_groups)
    assert errors[0] == errors[1] is not None and errors[0].startswith("parallel.ep_size: 1 on rank 0 (host ")
