"""Tests for `init_from`: what a new run takes over from another model, bit for bit, and what it does not."""

import io
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.builders import make_batch
from tests.converted_runs import MOE, loaded, make_run, write_config
from tests.imported_once import shorten_sample
from tests.ranks import Ranks, mesh_here
from trainer.checkpoint.checkpoint_folder import CheckpointFolder
from trainer.checkpoint.run_folder import RunFolder
from trainer.checkpoint.tensor_files import StoredTensors
from trainer.checkpoint.tools.verify import verify_checkpoint
from trainer.commands.init_from_parent import find_first_weights
from trainer.config.loader import load
from trainer.console.console import Console
from trainer.distributed.mesh import Mesh
from trainer.experiment import ExperimentConfig
from trainer.library.runs import load_run, train
from trainer.training.run import RunState
from trainer.training.setup import build_run


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of steps 0, 2 and 4."""
    shorten_sample()
    folder = make_run(tmp_path_factory.mktemp("stages"), "parent", MOE)
    config = load_run(folder).config
    train(config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update={"every": 2})}))
    return folder


def _config(folder: Path, name: str, overrides: list[str], moe: dict[str, Any] | None = None) -> ExperimentConfig:
    path = write_config(folder, name, {**MOE, **(moe or {})})
    return load(path, [f"runs_dir={folder}/children", "seed=5", *overrides], ExperimentConfig)


def _start(config: ExperimentConfig, mesh: Mesh | None = None) -> tuple[RunState, str]:
    """Return a run that has just begun, and what it says."""
    mesh, screen = mesh or Mesh.of_one(), io.StringIO()
    folder = RunFolder(Path(config.runs_dir) / config.name)
    first = find_first_weights(config, folder)
    if mesh.layout.rank == 0:
        if first is not None:
            first.verify(warn=print)
        folder.lock()
    console = Console(0, file=screen)
    return build_run(config, folder, console, mesh, torch.device("cpu"), first_weights=first), screen.getvalue()


def _stored(run: Path, step: int = 0) -> dict[str, Tensor]:
    checkpoints = CheckpointFolder(run / "checkpoints")
    with StoredTensors(checkpoints.of_step(step), checkpoints.manifest(step)) as tensors:
        return {name: tensors.read(name).clone() for name in checkpoints.manifest(step).tensors}


def _assert_equal(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []


def test_a_new_run_begins_with_weights_moments_and_count_and_knows_its_parent(parent: Path) -> None:
    config = _config(parent.parents[1], "whole", [f"init_from.run={parent}", "init_from.parts=weights+optimizer"])
    run, said = _start(config)
    folder = RunFolder(Path(config.runs_dir) / "whole")
    _assert_equal(_stored(folder.path), _stored(parent, 4))
    assert f"first weights from {parent}: 17 tensors as they are, 34 of 34 moments after 4 optimizer steps" in said
    assert (run.start_step, run.position, run.engine.optimizer_steps) == (0, 0, 4)
    state = run.engine.state().slices
    _assert_equal({name: part.tensor for name, part in state.items()}, _stored(parent, 4))

    manifest = CheckpointFolder(folder.checkpoints).manifest(0)
    of = {"id": (parent / "run_id").read_text().strip(), "name": "parent", "step": 4, "folder": str(parent)}
    origin, made = json.loads(folder.origin.read_text()), json.loads(folder.made_from.read_text())
    assert origin["parent"] == manifest.run["parent"] == of and made["parents"] == [of]
    assert origin["id"] == manifest.run["id"] != of["id"] and run.id == origin["id"]
    assert manifest.run["data_fingerprint"] is None, "any text may follow"
    assert made["command"] == "init_from" and made["options"] == {"run": str(parent), "parts": "weights+optimizer"}
    assert verify_checkpoint(CheckpointFolder(folder.checkpoints), 0).findings == []


def test_weights_alone_come_without_moments_of_a_step_that_is_named(parent: Path) -> None:
    options = [f"init_from.run={parent}", "init_from.step=2"]
    config = _config(parent.parents[1], "weights", options)
    run, _ = _start(config)
    mine, theirs = _stored(run.folder.path), _stored(parent, 2)
    _assert_equal({n: t for n, t in mine.items() if "model." in n}, {n: t for n, t in theirs.items() if "model." in n})
    assert run.engine.optimizer_steps == 0
    moments = {name: part.tensor for name, part in run.engine.state().slices.items() if "optim." in name}
    assert moments and not any(moment.any() for moment in moments.values())
    named = _config(parent.parents[1], "named", [f"init_from.checkpoint={parent}/checkpoints/step_00000002"])
    _start(named)
    _assert_equal(_stored(Path(named.runs_dir) / "named"), mine)


def test_a_run_that_goes_on_needs_no_parent_and_repeats_every_step(parent: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    shutil.copytree(parent, theirs)
    options = [f"init_from.run={theirs}", "init_from.parts=weights+optimizer", "checkpoint.every=2"]
    config = _config(parent.parents[1], "resumed", options)
    run = train(config).path
    expected = _stored(run, 4)
    assert CheckpointFolder(run / "checkpoints").manifest(4).values["optimizer_steps"] == 8
    shutil.rmtree(theirs)
    shutil.rmtree(run / "checkpoints" / "step_00000004")
    assert find_first_weights(config, RunFolder(run)) is None
    train(config)
    _assert_equal(_stored(run, 4), expected)


def _on_two_ranks(folder: str, layouts: dict[str, list[str]]) -> dict[str, tuple[bool, bool]]:
    """Return for each layout whether logits, and this rank's state, equal those of the parent in one process."""
    parent, found = Path(folder) / "runs" / "parent", {}
    batch = make_batch(2, 16, vocab_size=256, seed=3)
    expected, stored = loaded(parent, 4).model(batch, want_logits=True).logits, _stored(parent, 4)
    for name, options in layouts.items():
        ep_size = 2 if "parallel.ep_size=2" in options else 1
        source = [f"init_from.run={parent}", "init_from.parts=weights+optimizer"]
        run, _ = _start(_config(Path(folder), name, [*source, *options]), mesh_here(ep_size=ep_size))
        state = {n: part for n, part in run.engine.state().slices.items() if part.length}
        same = [torch.equal(part.tensor, stored[n][part.start : part.start + part.length]) for n, part in state.items()]
        with torch.no_grad():
            logits = run.engine.model(batch, want_logits=True).logits
        run.engine.close()
        found[name] = (bool(torch.equal(logits, expected)), all(same))
    return found


def test_every_layout_and_engine_begins_with_the_parents_logits_and_moments(parent: Path, ranks: Ranks) -> None:
    layouts = {
        "ep1": [],
        "ep2": ["parallel.ep_size=2"],
        "shard": ["parallel.data=shard", "parallel.ep_size=2"],
        "zero1": ["engine.kind=deepspeed", "engine.zero_stage=1"],
    }
    for answer in ranks.run(2, _on_two_ranks, str(parent.parents[1]), layouts):
        assert answer == dict.fromkeys(layouts, (True, True))
