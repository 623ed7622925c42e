"""Tests for the command `upcycle`: the run that it writes, and what it refuses."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.converted_runs import MOE, loaded, make_run, write_config
from tests.folders import content_of
from tests.foreign_models import make_foreign, save_foreign
from trainer.checkpoint.checkpoint_folder import CheckpointFolder
from trainer.checkpoint.run_folder import RunFolder
from trainer.cli import main
from trainer.library.runs import load_run, train

COPIES = {**MOE, "d_ff": 24}


def _run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as exit_:
        main([str(argument) for argument in arguments])
    return int(exit_.value.code or 0)


def test_an_upcycled_run_names_its_parent_and_trains_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense = make_run(tmp_path, "dense", None)
    config = write_config(tmp_path, "moe", COPIES)
    assert _run("upcycle", dense, config) == 0 == _run("checkpoint", "verify", tmp_path / "runs" / "moe")
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 4 and said[0].startswith("logits differ by up to ") and "loss on held-out text: " in said[1]
    run = tmp_path / "runs" / "moe"
    record = json.loads((run / "made_from.json").read_text())
    assert abs(record["loss_before"] - record["loss_after"]) < 1e-5
    assert record["parents"][0]["id"] == (dense / "run_id").read_text().strip()
    assert json.loads((run / "origin.json").read_text())["parent"] == record["parents"][0]
    trained = train(load_run(run).config)
    assert trained.checkpoints == [0, 4]
    manifest = CheckpointFolder(RunFolder(run).checkpoints).manifest(4)
    assert manifest.run["id"] == (run / "run_id").read_text().strip()
    assert manifest.run["parent"] == record["parents"][0]


def test_the_weights_that_are_read_back_are_the_dense_ones(tmp_path: Path) -> None:
    dense = make_run(tmp_path, "dense", None)
    assert _run("upcycle", dense, write_config(tmp_path, "moe", {**COPIES, "first_dense_layers": 1})) == 0
    old, new = (loaded(run).model for run in (dense, tmp_path / "runs" / "moe"))
    for name in ("embedding.weight", "blocks.0.ffn.w_in.weight", "blocks.1.attention.qkv.weight"):
        assert torch.equal(old.get_parameter(name), new.get_parameter(name))
    experts = new.get_parameter("blocks.1.ffn.experts.w_out")
    assert torch.equal(experts, old.get_parameter("blocks.1.ffn.w_out.weight").expand_as(experts))


def test_a_change_is_refused_unless_it_is_allowed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense, config = make_run(tmp_path, "dense", None), write_config(tmp_path, "moe", COPIES)
    assert _run("upcycle", dense, config, "--noise", "0.1") == 4
    said = capsys.readouterr().err
    assert said.startswith("moe: not written: its logits differ by up to ") and len(said.splitlines()) == 1
    assert said.endswith(": noise 0.1 is added to the experts; --allow-change writes it\n")
    assert not (tmp_path / "runs" / "moe").exists()
    assert _run("upcycle", dense, config, "--noise", "0.1", "--allow-change") == 0
    assert json.loads((tmp_path / "runs" / "moe" / "made_from.json").read_text())["largest_logit_difference"] > 1e-3


REFUSED = {
    "model.moe=null": (2, "model.moe: is null in the new config"),
    "model.moe.d_ff=10": (2, "model.moe.d_ff: 10 does not divide d_ff 24 of the dense model"),
    "model.moe.d_ff=8": (2, "model.moe.num_experts: 4 is no multiple of 3"),
    "model.d_model=32": (2, "model.d_model: is 32, and 16 in the dense run"),
    "model.num_layers=3": (2, "model.num_layers: is 3, and 2 in the dense run"),
    "model.attention.head_dim=12": (2, "model.attention.head_dim: is 12, and null in the dense run"),
    "model.tie_embeddings=true": (2, "model.tie_embeddings: is true, and false in the dense run"),
    "name=dense": (2, "dense: exists; choose another name"),
}


@pytest.mark.parametrize("override", REFUSED)
def test_what_does_not_fit_is_one_line_and_leaves_nothing(
    override: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense, config = make_run(tmp_path, "dense", None), write_config(tmp_path, "moe", COPIES)
    before = content_of(tmp_path / "runs")
    code, message = REFUSED[override]
    assert _run("upcycle", dense, config, override) == code
    said = capsys.readouterr().err
    assert message in said and len(said.splitlines()) == 1
    assert content_of(tmp_path / "runs") == before


def test_a_run_that_is_damaged_or_not_there_or_no_dense_one_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense, config = make_run(tmp_path, "dense", None), write_config(tmp_path, "moe", COPIES)
    experts = make_run(tmp_path, "experts", MOE)
    damaged = tmp_path / "runs" / "damaged"
    shutil.copytree(dense, damaged)
    file = next((damaged / "checkpoints").glob("step_*/*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    (tmp_path / "empty").mkdir()
    empty = make_run(tmp_path, "without", None)
    shutil.rmtree(empty / "checkpoints")
    for run, code, message in (
        (experts, 2, "has 4 experts already"),
        (damaged, 4, "is damaged"),
        (empty, 4, "has no checkpoint"),
        (tmp_path / "empty", 4, "is not a run folder"),
        (tmp_path / "runs" / "nothing", 2, "no such file"),
    ):
        capsys.readouterr()
        assert _run("upcycle", run, config) == code, run
        said = capsys.readouterr().err
        assert message in said and len(said.splitlines()) == 1, said
    assert _run("upcycle", dense, config, "--step", "7") == 4
    assert not (tmp_path / "runs" / "moe").exists()


def test_another_tokenizer_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense, config = make_run(tmp_path, "dense", None), write_config(tmp_path, "moe", COPIES)
    assert _run("upcycle", dense, config, "data.tokenizer.kind=bpe", "data.tokenizer.vocab_size=300") == 2
    assert "data.tokenizer: kind bpe of moe gives other tokens than that of dense" in capsys.readouterr().err
    assert not (tmp_path / "runs" / "moe").exists()


def test_a_published_dense_model_becomes_a_mixture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A Llama that transformers made is imported, upcycled and exported as a mixture; two experts are its network."""
    monkeypatch.chdir(tmp_path)
    save_foreign(tmp_path / "theirs", make_foreign("llama", attention_bias=False, tie_word_embeddings=True))
    (tmp_path / "text.txt").write_text("It was a bright cold day in April, and the clocks were striking. " * 40)
    text = "data.sources=[{kind: text, path: text.txt}]"
    assert _run("import", "theirs", "name=dense", text, "data.cache_dir=cache", "parallel.device=cpu") == 0
    moe = "model.moe={num_experts: 8, d_ff: 10, router: {kind: top_k, top_k: 4}}"
    capsys.readouterr()
    assert _run("upcycle", "runs/dense", "runs/dense/config.yaml", "name=moe", moe) == 0
    assert capsys.readouterr().out.startswith("logits differ by up to ")
    record = json.loads((tmp_path / "runs/moe/made_from.json").read_text())
    assert record["granularity"] == 2 and record["largest_logit_difference"] < 1e-5
    assert _run("export", "runs/moe", "exported") == 0
    assert json.loads((tmp_path / "exported/config.json").read_text())["model_type"] == "mixtral"
