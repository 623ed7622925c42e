"""The studies of balancing run as their script says, and tell every run's figures."""

import sys
from pathlib import Path

import pytest

from scripts import routing_studies
from scripts.routing_studies import COLUMNS, CONFIG, STUDIES
from tests import imported_once
from tests.launched_ranks import ROOT
from trainer.config.loader import load
from trainer.experiment import ExperimentConfig

TINY = ["model.num_layers=1", "model.d_model=32", "model.moe.d_ff=16", "model.seq_len=32", "train.steps=4"]
SHORT = ["schedule.warmup_steps=1", "eval.every=4", "eval.max_tokens_per_domain=1024", "metrics.routing_gap_every=4"]


@pytest.mark.parametrize(("study", "name"), [(study, name) for study, runs in STUDIES.items() for name in runs])
def test_the_runs_of_a_study_are_experiments(study: str, name: str) -> None:
    load(CONFIG, ["seed=1", *STUDIES[study][name], *TINY, *SHORT], ExperimentConfig)


def _run_warm(command: list[str], **_: object) -> None:
    done = imported_once.run(command[1:], cwd=ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.nightly
def test_a_study_says_what_every_run_and_their_mean_gave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--seeds", "1", "2", "--runs-dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["routing_studies.py", "bias", *options, *TINY, *SHORT])
    monkeypatch.setattr(routing_studies.subprocess, "run", _run_warm)
    routing_studies.main()
    _, *lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines]
    figures = {" ".join(row[: -len(COLUMNS)]): [float(cell) for cell in row[-len(COLUMNS) :]] for row in rows}
    for name in STUDIES["bias"]:
        first, second, mean = (figures[f"{name}, {of}"] for of in ("seed 1", "seed 2", "mean"))
        assert mean == pytest.approx([(a + b) / 2 for a, b in zip(first, second, strict=True)], abs=2e-4)
        assert first != second
    assert len(figures) == 3 * len(STUDIES["bias"])
