"""Law: a run with adapters begins as its parent, resumes bit for bit, and leaves as the model that it computed."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.builders import make_batch
from tests.converted_runs import MOE, loaded, make_run, write_config
from tests.foreign_models import make_foreign, save_foreign
from trainer.checkpoint.checkpoint_folder import CheckpointFolder
from trainer.cli import main
from trainer.config.loader import load
from trainer.experiment import ExperimentConfig
from trainer.library.runs import load_run, train
from trainer.models.parameter_roles import is_adapter

LORA = "model.lora={rank: 4, alpha: 16, trains: [router]}"


def command(*arguments: object) -> int:
    with pytest.raises(SystemExit) as exit_:
        main(list(map(str, arguments)))
    return int(exit_.value.code or 0)


def logits(run: Path, step: int | None = None) -> Tensor:
    """Return a run's logits of some text."""
    batch = make_batch(2, 12, vocab_size=200, seed=7)
    with torch.no_grad():
        found = loaded(run, step).model(batch, want_logits=True).logits
    assert found is not None
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A trained run, and one that adapted it for 4 steps with checkpoints of steps 0, 2 and 4."""
    parent = make_run(tmp_path_factory.mktemp("lora"), "parent", MOE)
    train(load_run(parent).config)
    return parent, adapt(parent, "child", [])


def adapt(parent: Path, name: str, more: list[str]) -> Path:
    overrides = [f"init_from.run={parent}", LORA, "checkpoint.every=2", "checkpoint.keep=9", "seed=3"]
    rates = ["schedule.peak_lr=1e-2"]
    path = write_config(parent.parents[1], name, MOE)
    train(load(path, [*overrides, *rates, *more], ExperimentConfig))
    return parent.parent / name


def test_it_begins_with_the_logits_of_its_parent_bit_for_bit(runs: tuple[Path, Path]) -> None:
    parent, child = runs
    assert torch.equal(logits(child, 0), logits(parent))
    assert float((logits(child) - logits(parent)).abs().max()) > 1e-3, "and learns"
    before, after = (loaded(run).model.state_dict() for run in (parent, child))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if ".router." in name}


def test_its_checkpoints_hold_moments_of_what_learns_only(runs: tuple[Path, Path]) -> None:
    checkpoints = CheckpointFolder(runs[1] / "checkpoints")
    tensors = checkpoints.manifest(4).tensors
    moments = {name.removeprefix("optim.exp_avg.") for name in tensors if name.startswith("optim.exp_avg.")}
    assert moments == {
        name.removeprefix("model.")
        for name in tensors
        if name.startswith("model.") and (is_adapter(name) or ".router." in name)
    }
    assert all(tensors[name].is_of_experts for name in tensors if "_lora_" in name)


def test_it_resumes_bit_for_bit(runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    parent, _ = runs
    half = adapt(parent, "half", ["train.steps=2", "schedule.kind=warmup_stable_decay"])
    assert re.search(r"active, 0\.00\d+M \(\d+\.\d\d%\) learn", " ".join(capsys.readouterr().out.split()))
    whole = adapt(parent, "whole", ["train.steps=4", "schedule.kind=warmup_stable_decay"])
    assert command("train", half, "train.steps=4") == 0
    one, other = (loaded(run).model.state_dict() for run in (half, whole))
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_merged_it_computes_the_same_and_learns_as_a_whole(
    runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    _, child = runs
    assert command("surgery", "merge-lora", child, "merged") == 0
    said = capsys.readouterr().out
    assert "merged the adapters of 8 weights, of rank 4" in said and "logits differ by up to" in said
    merged = child.parent / "merged"
    expected = logits(child)
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-6 * float(expected.abs().max()))
    config = load_run(merged).config
    assert config.model.lora is None
    assert json.loads((merged / "origin.json").read_text())["parent"]["name"] == "child"
    assert command("train", merged) == 0


def test_what_names_adapters_alone_is_left_out_of_the_merged_run(
    runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """As LoRA+ has it: a rate for B, and what is frozen besides."""
    plus = ["train.lr_scale={'*lora_b': 16, router: 0.5}", "train.freeze=['*lora_a', '!blocks.0.*']", "train.steps=2"]
    child = adapt(runs[0], "plus", plus)
    assert command("surgery", "merge-lora", child, "plus-merged") == 0
    assert "are without *lora_a, *lora_b: those weights are gone" in capsys.readouterr().out
    train_section = load_run(child.parent / "plus-merged").config.train
    assert list(train_section.freeze) == [] and train_section.lr_scale == {"router": 0.5}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["prune", "--keep", "3"],
            "surgery prune: the run has adapters (model.lora); merge them into its weights first",
        ),
        (["average", "--last", "2"], "surgery average: the run has adapters (model.lora); merge them"),
        (["merge-lora"], "surgery merge-lora: the run has no adapters (model.lora: null); name another one"),
    ],
)
def test_surgery_says_what_to_merge_first(
    arguments: list[Any], message: str, runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    verb, *options = arguments
    run = runs[0] if verb == "merge-lora" else runs[1]
    assert command("surgery", verb, run, "never", *options) == 2
    assert message in capsys.readouterr().err
    assert not (run.parent / "never").exists()


def test_a_run_without_adapters_does_not_begin_from_one_with_them(
    runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    _, child = runs
    path = write_config(child.parents[1], "plain", MOE)
    assert command("train", path, f"init_from.run={child}") == 2
    assert "surgery merge-lora" in capsys.readouterr().err


def test_neither_upcycling_nor_an_import_takes_adapters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    experts = {"num_experts": 4, "d_ff": 24}
    dense = make_run(tmp_path, "dense", None)
    new = write_config(tmp_path, "new", experts, lora={"rank": 2})
    assert command("upcycle", dense, new) == 2
    assert "model.lora: upcycling makes whole experts; leave it out" in capsys.readouterr().err
    (tmp_path / "more").mkdir()
    adapted = make_run(tmp_path / "more", "dense", None, lora={"rank": 2})
    assert command("upcycle", adapted, write_config(tmp_path, "other", experts)) == 2
    assert "has adapters; merge them into its weights first, by surgery merge-lora" in capsys.readouterr().err
    save_foreign(tmp_path / "foreign", make_foreign("mixtral"))
    theirs = {"num_experts": 4, "d_ff": 24, "router": {"kind": "top_k", "top_k": 2}}
    path = write_config(tmp_path, "imported", theirs, lora={"rank": 2})
    assert command("import", tmp_path / "foreign", path) == 2
    assert "model.lora: an import writes what was published, which has no adapters; leave" in capsys.readouterr().err
