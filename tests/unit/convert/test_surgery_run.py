"""Tests for the command `surgery`: the runs that it writes, and what it refuses."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.converted_runs import MOE, loaded, make_run
from tests.folders import content_of
from tests.foreign_models import make_foreign, save_foreign
from trainer.cli import main
from trainer.convert.hf_import import import_model
from trainer.convert.surgery_plan import AverageRuns
from trainer.library.runs import load_run, train
from trainer.prove.proof import prove


def _surgery(*arguments: object) -> int:
    with pytest.raises(SystemExit) as exit_:
        main(["surgery", *map(str, arguments)])
    return int(exit_.value.code or 0)


VERBS = {
    "prune": ["--keep", "3"],
    "merge": ["--keep", "3"],
    "split": ["--halves"],
    "add": ["--count", "2"],
    "to-dense": [],
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of steps 0, 2 and 4."""
    folder = make_run(tmp_path_factory.mktemp("surgery"), "experts", MOE)
    config = load_run(folder).config
    train(config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update={"every": 2})}))
    return folder


@pytest.mark.parametrize("verb", VERBS)
def test_a_changed_run_states_both_losses_and_its_parent(
    verb: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"{verb}-{tmp_path.name[:40]}"
    assert _surgery(verb, run, name, *VERBS[verb], "--tokens", "256", "train.steps=2") == 0
    said = capsys.readouterr().out.splitlines()
    new = run.parent / name
    record = json.loads((new / "made_from.json").read_text())
    assert said[-2] == f"loss on held-out text: {record['loss_before']:.4f} before, {record['loss_after']:.4f} after"
    assert said[:-2] == record["notes"] and record["command"] == f"surgery {verb}"
    assert (record["parents"][0]["name"], record["parents"][0]["step"]) == ("experts", 4)
    assert json.loads((new / "origin.json").read_text())["parent"] == record["parents"][0]
    with pytest.raises(SystemExit) as exit_:
        main(["checkpoint", "verify", str(new)])
    assert exit_.value.code == 0
    assert loaded(new).model.config == load_run(new).config.model
    shutil.rmtree(new)


def test_a_changed_run_trains_on_and_its_config_is_proven(run: Path) -> None:
    assert _surgery("prune", run, "pruned", "--keep", "2", "train.steps=2") == 0
    new = load_run(run.parent / "pruned")
    fixed = {"steps": 1, "dtype": None, "is_small": False, "engines": None, "json_path": None, "timeout_s": 120}
    assert prove(new.config, only="ep 2, all_to_all", **fixed) == 0  # type: ignore[arg-type]
    assert train(new.config).checkpoints == [0, 2]
    loss = new.series("eval/loss")[1][-1]
    assert loss < json.loads((new.path / "made_from.json").read_text())["loss_after"]
    shutil.rmtree(new.path)


def test_an_average_is_the_mean_of_the_checkpoints(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = [loaded(run, step).model.get_parameter("blocks.1.ffn.experts.w_in").double() for step in (0, 2, 4)]
    for name, arguments, shares in (
        ("soup", ["--steps", "0,2,4"], [1 / 3, 1 / 3, 1 / 3]),
        ("weighted", ["--steps", "0,4", "--weights", "1,3"], [0.25, 0, 0.75]),
        ("ema", ["--last", "3", "--ema", "0.5"], [0.25, 0.25, 0.5]),
        ("two", ["--runs", run], [0, 0, 1]),
    ):
        assert _surgery("average", run, name, *arguments) == 0
        expected = sum(weight * share for weight, share in zip(weights, shares, strict=True))
        found = loaded(run.parent / name).model.get_parameter("blocks.1.ffn.experts.w_in")
        torch.testing.assert_close(found, torch.as_tensor(expected).float(), rtol=1e-6, atol=1e-7)
        record = json.loads((run.parent / name / "made_from.json").read_text())
        assert record["parents"][0]["step"] == 4
        shutil.rmtree(run.parent / name)


def test_the_shares_of_an_ema_are_those_of_its_recursion() -> None:
    shares, mean = AverageRuns(ema=0.9).shares(5), torch.eye(5)[0]
    for new in torch.eye(5)[1:]:
        mean = 0.9 * mean + 0.1 * new
    assert shares == pytest.approx(mean.tolist()) and sum(shares) == pytest.approx(1)


REFUSED = {
    "prune x --keep 4": (2, "--keep: 4 of 4 experts; use 1 to 3"),
    "prune x --keep 1": (2, "model.moe.router.top_k: 2 is more than num_experts 1"),
    "prune x": (2, "give either --keep or --experts"),
    "prune x --keep 2 --experts 1": (2, "give either --keep or --experts"),
    "prune x --experts 4": (2, "--experts: 4 is not an expert; use 0 to 3"),
    "prune x --experts 1,1": (2, "names an expert of layer 0 twice"),
    "prune x --experts 0:1/1:2,3": (2, "names 1 of layer 0, 2 of layer 1"),
    "prune x --experts 0:1": (2, "names 1 of layer 0, 0 of layer 1"),
    "prune x --experts 7:1": (2, "layer 7 has no experts; those are 0, 1"),
    "prune x --experts one": (2, "must be a whole number"),
    "prune x --experts 1/2": (2, "must name a layer before each list"),
    "prune experts --keep 3": (2, "experts: exists; choose another name"),
    "prune ../x --keep 3": (2, "name: '../x'"),
    "prune x --keep 3 --step 3": (4, "has no checkpoint of step 3; it has 0, 2, 4"),
    "prune x --keep 3 model.d_model=32": (2, "model"),
    "split x --experts 1": (4, "--allow-change writes it"),
    "split x --halves --experts 1": (2, "--halves is for all experts"),
    "add x --count 5": (2, "--count: 5 is more than the 4 experts to copy"),
    "to-dense x --d-ff 20": (2, "--d-ff: 20 is not 0 of the shared experts plus 1 to 4 times 12 of an expert; 24 is"),
    "average x": (2, "one checkpoint is its own average"),
    "average x --steps 0,1": (4, "has no checkpoint of step 1"),
    "average x --last 4": (2, "--last: 4 of the 3 checkpoints"),
    "average x --steps 0,2 --weights 1": (2, "1 weights for 2 checkpoints"),
    "average x --steps 0,2 --weights 0,0": (2, "must be numbers of at least 0 and not all 0"),
    "average x --steps 0,2 --last 2": (2, "give --steps or --last, not both"),
    "average x --runs nothing": (2, "no such file"),
}


@pytest.mark.parametrize("command", REFUSED)
def test_what_cannot_be_done_is_one_line_and_leaves_nothing(
    command: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    verb, *arguments = command.split()
    before = content_of(run.parent)
    code, message = REFUSED[command]
    assert _surgery(verb, run, *arguments) == code
    said = capsys.readouterr().err
    assert message in said and len(said.splitlines()) == 1, said
    assert content_of(run.parent) == before


def test_runs_without_experts_or_of_other_models_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense, experts = make_run(tmp_path, "dense", None), make_run(tmp_path, "experts", MOE)
    wide, other = make_run(tmp_path, "wide", {**MOE, "d_ff": 16}), make_run(tmp_path, "other", MOE, seed=1)
    for verb, arguments in VERBS.items():
        assert _surgery(verb, dense, "x", *arguments) == 2
        assert "the run is dense, and has no experts" in capsys.readouterr().err
    assert _surgery("average", experts, "x", "--runs", wide) == 4
    assert "model.moe.d_ff is 16 in it and 12 in the config" in capsys.readouterr().err
    assert _surgery("average", experts, "soup", "--runs", f"{other},{other}", "--weights", "2,1,1") == 0
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["dense", "experts", "other", "soup", "wide"]


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss"])
def test_a_model_that_transformers_made_is_operated_on(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a gate on shared experts, and with biases: what dense layers cannot express is refused."""
    monkeypatch.chdir(tmp_path)
    save_foreign(Path("theirs"), make_foreign(family))
    Path("text.txt").write_text("It was a bright cold day in April, and the clocks were striking. " * 100)
    text = ["data.sources=[{kind: text, path: text.txt}]", f"data.cache_dir={tmp_path}/cache", "train.steps=2"]
    imported = import_model(Path("theirs"), None, ["name=theirs", "parallel.device=cpu", *text], gate="logits").run
    for verb, arguments in (("split", ["--halves"]), ("prune", ["--keep", "3"]), ("merge", ["--keep", "3"])):
        assert _surgery(verb, imported, verb, *arguments, "--tokens", "64") == 0, capsys.readouterr().err
    assert loaded(Path("runs/split")).model.config.moe_layers == loaded(imported).model.config.moe_layers
    assert _surgery("to-dense", imported, "flat") == 2
    assert "cannot be expressed as dense" in capsys.readouterr().err


def test_a_dense_model_of_foreign_weights_is_upcycled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_foreign(Path("theirs"), make_foreign("mixtral"))
    Path("text.txt").write_text("It was a bright cold day in April, and the clocks were striking. " * 100)
    text = ["data.sources=[{kind: text, path: text.txt}]", f"data.cache_dir={tmp_path}/cache"]
    imported = import_model(Path("theirs"), None, ["name=theirs", "parallel.device=cpu", *text], gate="logits").run
    assert _surgery("to-dense", imported, "flat", "--tokens", "64") == 0
    width = load_run("runs/flat").config.model.d_ff
    arguments = ["upcycle", "runs/flat", "runs/flat/config.yaml", "name=experts", f"model.moe.d_ff={width}"]
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 0
    assert json.loads(Path("runs/experts/made_from.json").read_text())["largest_logit_difference"] < 1e-5
