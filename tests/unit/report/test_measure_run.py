"""Tests for the numbers of a report, against the logs of a tiny run and the evaluation of the same text."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.tiny_training import config_of, train_here
from trainer.checkpoint.run_folder import RunFolder
from trainer.cli import main
from trainer.distributed.rank_layout import Layout
from trainer.evaluation.held_out import evaluate_held_out
from trainer.experiment import ExperimentConfig
from trainer.report.measure_drops import count_drops
from trainer.report.measure_options import MeasureOptions
from trainer.report.measure_run import measure_run
from trainer.report.read_checkpoint import read_checkpoint
from trainer.report.report_data import ReportData
from trainer.runs.recorded_run import RecordedRun

MOE = "model.moe.router={kind: top_k, top_k: 2}"


def train(folder: Path, *overrides: str) -> tuple[ExperimentConfig, RecordedRun]:
    """Train a tiny run on two short texts."""
    (folder / "a.txt").write_text("It was a bright cold day in April, and the clocks were striking.\n" * 300)
    (folder / "b.txt").write_text("\u00dcber allen Gipfeln ist Ruh, in allen Wipfeln sp\u00fcrest du\n" * 300)
    sources = ", ".join(f"{{kind: text, path: {folder}/{name}.txt, domain: {name}}}" for name in "ab")
    config = config_of(folder, f"data.sources=[{sources}]", *overrides)
    train_here(config)
    return config, RecordedRun(Path(config.runs_dir) / config.name)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[ExperimentConfig, RecordedRun, ReportData]:
    """A run with a capacity, and its report."""
    config, run = train(tmp_path_factory.mktemp("run"), MOE, "model.moe.capacity.factor=1.0")
    return config, run, measure_run(run, config, MeasureOptions(), pytest.fail)


def test_loss_load_and_information_are_those_of_the_logs(
    measured: tuple[ExperimentConfig, RecordedRun, ReportData],
) -> None:
    config, run, data = measured
    logged: dict[str, float] = {}
    for record in run.metrics():
        logged |= record
    assert data.text is not None
    assert data.text.loss == pytest.approx(logged["eval/loss"], abs=1e-12)
    assert data.text.bits_per_byte == pytest.approx(logged["eval/bits_per_byte"], abs=1e-12)
    for domain, loss in zip(data.text.domains, data.text.domain_loss, strict=True):
        assert loss == pytest.approx(logged[f"eval/{domain}/loss"], abs=1e-12)
    found = np.mean([layer.mutual_information for layer in data.layers])
    assert found == pytest.approx(logged["eval/expert_domain_mi"], abs=1e-12)
    assert data.card.last["loss"] == logged["loss"] and data.card.trained_tokens == logged["tokens"]
    counts = [record["counts"] for record in run.routing()][-1]
    assert data.card.training_load == tuple(tuple(n / sum(layer) for n in layer) for layer in counts)
    assert max(max(layer) * len(layer) for layer in data.card.training_load) == pytest.approx(
        logged["load_imbalance"], abs=1e-12
    )
    assert (data.card.step, data.card.planned_steps, data.card.domains) == (12, config.train.steps, ("a", "b"))


def test_layers_agree_with_the_evaluation_and_with_themselves(
    measured: tuple[ExperimentConfig, RecordedRun, ReportData],
) -> None:
    config, run, data = measured
    loaded = read_checkpoint(run, config, MeasureOptions(), pytest.fail)
    result = evaluate_held_out(
        loaded.engine,
        loaded.corpus,
        packing=config.data.packing,
        batch_size=config.parallel.micro_batch_size,
        max_tokens_per_domain=config.eval.max_tokens_per_domain,
        at_capacity=True,
        layout=Layout(),
    )
    assert [[list(row) for row in layer.domain_counts] for layer in data.layers] == result.counts()
    assert result.at_capacity is not None
    dropped = count_drops(loaded.engine, loaded.batches, 2)[:, 1].sum(-1)  # (L, G)
    expected = [domain.sums.routing.dropped.tolist() for domain in result.at_capacity if domain.sums.routing]
    assert dropped.T.tolist() == expected and dropped.sum() > 0
    for layer in data.layers:
        total = sum(map(sum, layer.domain_counts))
        assert layer.drops is not None and layer.coactivation is not None and layer.output_similarity is not None
        assert sum(layer.load) == pytest.approx(1, abs=1e-12) and total == 2 * (data.text.tokens if data.text else 0)
        assert sum(expert.tokens for expert in layer.experts) == total
        assert [layer.output_similarity[e][e] for e in range(4)] == pytest.approx([1] * 4, abs=1e-5)
        assert sum(layer.coactivation[0]) == pytest.approx(2, abs=1e-12)  # itself, and one other
    [flow] = data.flows
    assert sum(map(sum, flow.counts)) == 4 * (data.text.tokens if data.text else 0)


def test_checkpoints_are_compared_with_the_newest(
    measured: tuple[ExperimentConfig, RecordedRun, ReportData],
) -> None:
    config, run, data = measured
    assert [found.step for found in data.checkpoints] == run.checkpoints == [3, 6, 9, 12]
    last = data.checkpoints[-1]
    assert data.text is not None and last.loss == data.text.loss and last.saturation == (1.0, 1.0)
    assert last.mutual_information == tuple(layer.mutual_information for layer in data.layers)
    assert data.checkpoints[0].loss > last.loss and all(0 < share < 1 for share in data.checkpoints[0].saturation)
    early = measure_run(run, config, MeasureOptions(step=3, max_checkpoints=1), pytest.fail)
    assert early.text is not None and early.text.loss == data.checkpoints[0].loss
    assert [found.step for found in early.checkpoints] == [3]


def test_fewer_tokens_are_fewer_rows_of_every_domain(
    measured: tuple[ExperimentConfig, RecordedRun, ReportData],
) -> None:
    config, run, _ = measured
    data = measure_run(run, config, MeasureOptions(max_tokens=64, max_checkpoints=1), pytest.fail)
    assert data.text is not None and data.text.domain_tokens == (32, 32)


def test_dense_models_and_runs_without_a_checkpoint_have_a_report_too(tmp_path: Path) -> None:
    config, run = train(tmp_path, "model.moe=null", "train.steps=2", "checkpoint.every=null")
    data = measure_run(run, config, MeasureOptions(), pytest.fail)
    assert data.text is not None and data.layers == data.flows == data.checkpoints == ()
    assert data.card.parameters == data.card.active_parameters and data.card.training_load == ()
    shutil.rmtree(run.folder.checkpoints)
    bare = measure_run(run, config, MeasureOptions(), pytest.fail)
    assert bare.text is None and bare.card.last == data.card.last
    assert bare.card == replace(data.card, step=None, domains=())
    assert bare.remarks == ("There is no checkpoint yet: only curves are shown.",)


def test_the_command_writes_the_numbers_of_several_runs(
    measured: tuple[ExperimentConfig, RecordedRun, ReportData], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, run, data = measured
    target, copy = tmp_path / "report.json", tmp_path / "copy"
    shutil.copytree(run.path, copy)
    shutil.rmtree(RunFolder(copy).checkpoints)
    assert _exit_code("report", str(run.path), str(copy), "--json", str(target), "--checkpoints", "1") == 0
    first, second = json.loads(target.read_text())
    assert data.text is not None and first["text"]["loss"] == data.text.loss
    assert (first["card"]["folder"], second["card"]["folder"]) == (str(run.path), str(copy))
    assert second["text"] is None and second["card"]["last"] == first["card"]["last"]
    assert f"written to {target}" in capsys.readouterr().err


def test_bad_runs_and_targets_are_refused_before_anything_is_measured(
    measured: tuple[ExperimentConfig, RecordedRun, ReportData], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(measured[1].path)
    for arguments, message in [
        ([run, str(tmp_path / "gone")], f"{tmp_path / 'gone'}: no such file, and no such run folder"),
        ([run, str(tmp_path)], f"{tmp_path}: has no config.yaml, so it is not a run folder; train first"),
        ([run, "--json", str(tmp_path)], f"--json: {tmp_path}: is a folder; name a file in a folder that exists"),
        ([run, "--step", "7"], "has no checkpoint of step 7; it has 3, 6, 9, 12"),
        ([run, run, "--step", "3"], "--step: chooses a checkpoint of one run, and 2 are named; name one"),
    ]:
        assert _exit_code("report", *arguments) in {2, 3, 4}
        said = capsys.readouterr()
        assert message in said.err and said.out == ""


def _exit_code(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert isinstance(exit_.value.code, int)
    return exit_.value.code
