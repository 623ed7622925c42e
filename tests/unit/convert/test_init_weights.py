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
from tests.foreign_models import make_foreign, save_foreign
from tests.imported_once import shorten_sample
from tests.ranks import Ranks, mesh_here
from trainer import fault_injection
from trainer.checkpoint.checkpoint_folder import CheckpointFolder
from trainer.checkpoint.run_folder import RunFolder
from trainer.checkpoint.tensor_files import StoredTensors
from trainer.checkpoint.tools.verify import verify_checkpoint
from trainer.commands.init_from_parent import find_first_weights
from trainer.config.loader import load
from trainer.console.console import Console
from trainer.convert.hf_import import import_model
from trainer.convert.init_plan import InitPlan
from trainer.convert.loaded_run import new_engine
from trainer.convert.parent_tensors import open_parent
from trainer.convert.weight_parent import find_parent
from trainer.data.tokenizers.byte import ByteTokenizer
from trainer.distributed.mesh import Mesh
from trainer.errors import ConfigError
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


def test_frozen_weights_have_no_moments_and_learn_later_as_in_a_new_optimizer(parent: Path) -> None:
    both, frozen = "init_from.parts=weights+optimizer", ["router", "experts"]
    first, _ = _start(
        _config(parent.parents[1], "frozen", [f"init_from.run={parent}", both, f"train.freeze=[{', '.join(frozen)}]"])
    )
    of_frozen = [name for name in _stored(first.folder.path) if any(f".{role}." in name for role in frozen)]
    assert of_frozen and not any(name.startswith("optim.") for name in of_frozen)
    source = f"init_from.checkpoint={first.folder.path}/checkpoints/step_00000000"
    second, _ = _start(_config(parent.parents[1], "learning", [source, both]))
    late = {name.removeprefix("model.") for name in of_frozen} & second.engine.learning.keys()
    assert second.engine.moments_since == dict.fromkeys(late, 4) and second.engine.optimizer_steps == 4
    stored = _stored(parent, 4)
    for name, part in second.engine.state().slices.items():
        is_anew = name.startswith("optim.") and any(f".{role}." in name for role in frozen)
        assert torch.equal(part.tensor, torch.zeros_like(part.tensor) if is_anew else stored[name]), name
    for run in (first, second):
        assert verify_checkpoint(CheckpointFolder(run.folder.checkpoints), 0).findings == []


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


def test_excluded_tensors_have_the_initial_values_of_the_seed_and_renamed_ones_other_places(parent: Path) -> None:
    """Three layers from two: the first two change places, the last is new, and so are the head and all routers."""
    options = [
        *(f"init_from.run={parent}", "init_from.exclude=[head, router, blocks.2]", "model.num_layers=3"),
        "init_from.rename={'blocks.0.*': 'blocks.1.*', 'blocks.1.*': 'blocks.0.*'}",
    ]
    config = _config(parent.parents[1], "layers", [*options, "init_from.parts=weights+optimizer"])
    run, said = _start(config)
    theirs, mine = _stored(parent, 4), _stored(run.folder.path)
    fresh = dict(new_engine(config, ByteTokenizer(), print).model.named_parameters())
    assert "14 tensors as they are, 10 with initial values" in said
    since = CheckpointFolder(run.saver.folder.path).manifest(0).values
    for name, weight in fresh.items():
        block = name.split(".")[1]
        is_fresh = block == "2" or "router" in name or name == "head.weight"
        there = name.replace(f"blocks.{block}.", f"blocks.{1 - int(block)}.") if block in "01" else name
        expected = weight.detach() if is_fresh else theirs[f"model.{there}"]
        assert torch.equal(mine[f"model.{name}"], expected), name
        moment = torch.zeros_like(expected) if is_fresh else theirs[f"optim.exp_avg.{there}"]
        assert torch.equal(mine[f"optim.exp_avg.{name}"], moment), name
        assert since.get(f"moments_since.{name}", 0) == (4 if is_fresh else 0), "its own first step comes next"


def test_deepspeed_which_counts_steps_once_for_all_refuses_moments_of_some_weights(parent: Path) -> None:
    options = [f"init_from.run={parent}", "init_from.parts=weights+optimizer", "engine.kind=deepspeed"]
    for name, more in {"all": [], "some": ["init_from.exclude=[head]"]}.items():
        config = _config(parent.parents[1], name, [*options, *more])
        assert config.init_from is not None
        with open_parent(find_parent(config.init_from, RunFolder(Path("none"))), warn=print) as tensors:
            plan = InitPlan(config, config.init_from, tensors, num_ids=256)
            plan.sources(tensors.tensors, ByteTokenizer())
            if not more:
                plan.check_engine()
                continue
            with pytest.raises(ConfigError, match=r"parts: head\.weight begins without moments, and others with"):
                plan.check_engine()


def test_a_published_folder_gives_what_an_import_of_it_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = save_foreign(tmp_path / "theirs", make_foreign("deepseek_v3"))
    imported = import_model(folder, None, ["name=imported"], gate="tensors").run
    text = tmp_path / "text.txt"
    text.write_text("It was a bright cold day in April. " * 40)
    overrides = ["name=started", f"init_from.hf={folder}", "parallel.device=cpu", "train.global_batch_size=2"]
    overrides += [f"data.sources=[{{kind: text, path: {text}}}]", "data.cache_dir=cache"]
    run, said = _start(load(imported / "config.yaml", overrides, ExperimentConfig))
    _assert_equal(_stored(run.folder.path), _stored(imported))
    assert "tensors as they are" in said and run.parent is None
    assert json.loads(run.folder.made_from.read_text())["from"]["family"] == "deepseek_v3"


@pytest.mark.parametrize("number", [2, 3, 7])
def test_other_numbers_of_experts_keep_the_most_used_ones_or_copy_them(parent: Path, number: int) -> None:
    name = f"experts{number}"
    config = _config(parent.parents[1], name, [f"init_from.run={parent}"], {"num_experts": number})
    _, said = _start(config)
    theirs, mine = _stored(parent, 4), _stored(Path(config.runs_dir) / name)
    for layer, counts in enumerate(theirs["engine.previous_counts"].tolist()):
        by_use = sorted(range(4), key=lambda e: (-counts[e], e))
        sources = sorted(by_use[:number]) if number < 4 else [0, 1, 2, 3, *by_use[: number - 4]]
        for part in ("experts.w_in", "experts.w_out", "router.gate.weight"):
            here, there = (tensors[f"model.blocks.{layer}.ffn.{part}"] for tensors in (mine, theirs))
            assert torch.equal(here[:4], there[sources[:4]]), "kept as they are"
            for i, e in enumerate(sources[4:], 4):
                noise = (here[i] - there[e]) / there[e].std(correction=0)
                assert 0 < float(noise.square().mean().sqrt()) < 0.2, "a copy differs by a tenth of a deviation"
    outside = [n for n in mine if "model." in n and "experts" not in n and "router" not in n]
    _assert_equal({n: mine[n] for n in outside}, {n: theirs[n] for n in outside})
    what = "all and noisy copies of the 3" if number > 4 else f"the {number}"
    assert f"{number} experts from 4: {what} most used" in said


@pytest.mark.parametrize("point", ["save.mid_file", "save.before_rename", "save.committed"])
def test_a_start_that_fails_on_its_way_leaves_no_checkpoint_and_the_next_one_is_whole(
    parent: Path, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config(parent.parents[1], point, [f"init_from.run={parent}"])
    monkeypatch.setattr(fault_injection, "_PLANNED", fault_injection.parse_faults(f"{point}=raise", "0"))
    with pytest.raises(RuntimeError, match="planted"):
        _start(config)
    folder = RunFolder(Path(config.runs_dir) / config.name)
    is_committed = point == "save.committed"
    assert CheckpointFolder(folder.checkpoints).steps() == ([0] if is_committed else [])
    assert folder.made_from.exists() == is_committed and not CheckpointFolder(folder.checkpoints).leftovers()
    run, _ = _start(config)
    assert run.parent is not None and folder.made_from.exists()
    mine, theirs = _stored(folder.path), _stored(parent, 4)
    _assert_equal({n: t for n, t in mine.items() if "model." in n}, {n: t for n, t in theirs.items() if "model." in n})
