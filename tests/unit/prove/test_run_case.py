"""Errors of a layout's ranks."""

import pytest

from trainer.errors import ConfigError
from trainer.experiment import ExperimentConfig
from trainer.prove.cases import Case
from trainer.prove.pool import Failure, LocalRanks
from trainer.prove.run_case import run_case


def test_the_error_of_a_rank_names_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    failures = [Failure(ConfigError("rank 0: no"), "traceback")] * 2
    monkeypatch.setattr(LocalRanks, "run", lambda self, *arguments, **options: failures)
    config = ExperimentConfig.model_validate({"name": "x"})
    with pytest.raises(ConfigError, match=r"^rank 0: no$"):
        run_case(config, Case(world_size=2, micro_batch_size=1), LocalRanks(), steps=1, timeout_s=1.0)
