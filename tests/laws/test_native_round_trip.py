"""Law: a run of ours that is exported and imported is the same bit for bit, whoever wrote its checkpoint."""

from pathlib import Path

import pytest

from tests.exported_runs import make_run
from tests.family_models import MODELS
from tests.launched_ranks import ROOT
from tests.native_trips import EP_SIZES, Case, NativeRun, cases_of, check_trip, write_runs
from tests.ranks import Ranks
from trainer.config.loader import load as load_config
from trainer.experiment import ExperimentConfig

CASES = [
    cases[n + (n // 3 + shift) % 3]
    for shift, cases in enumerate(map(cases_of, MODELS))
    for n in range(0, len(cases), len(EP_SIZES))
]
"""Of every number of key heads, tied and untied, one number of ranks; `python -m tests.native_trips` runs all."""


@pytest.fixture(scope="module")
def runs(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> dict[Case, NativeRun]:
    return write_runs(ranks, tmp_path_factory.mktemp("runs"), {case: case.model() for case in CASES})


@pytest.mark.one_in(3)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_ours_comes_back(case: Case, runs: dict[Case, NativeRun], tmp_path: Path) -> None:
    check_trip(runs[case], tmp_path, shard_bytes=20_000)


def test_the_quickstart_comes_back(tmp_path: Path) -> None:
    model = load_config(ROOT / "configs/quickstart.yaml", [], ExperimentConfig).model
    config, run, _ = make_run(tmp_path, model.model_dump(), file_bytes=1_000_000)
    quickstart = NativeRun(family="qwen3_moe", config=config, alone=run, by_ranks=run)
    check_trip(quickstart, tmp_path, shard_bytes=5_000_000)
