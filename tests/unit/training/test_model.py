"""The kernel of a run: chosen by the table, checked on the device, recorded as it is used."""

from pathlib import Path

import pytest
import torch

from trainer.config.loader import load
from trainer.distributed.mesh import Mesh
from trainer.experiment import ExperimentConfig
from trainer.parallel.canary import CanaryReport
from trainer.training.model import check_kernel, resolve_kernel

CPU = torch.device("cpu")


SMOKE = Path(__file__).parents[3] / "configs/smoke.yaml"


def _config(*overrides: str) -> ExperimentConfig:
    return load(SMOKE, list(overrides), ExperimentConfig)


def _checked(config: ExperimentConfig) -> tuple[ExperimentConfig, CanaryReport | None, list[str]]:
    warnings: list[str] = []
    found, report = check_kernel(resolve_kernel(config, CPU), Mesh.of_one(), CPU, warn=warnings.append)
    return found, report, warnings


def test_a_kernel_that_the_table_chose_may_be_replaced_also_when_the_run_is_resumed() -> None:
    resolved = resolve_kernel(_config(), CPU).parallel
    assert resolved.experts_kernel != "auto" and resolved.kernel_canary == "fall_back"
    assert resolve_kernel(_config("parallel.experts_kernel=loop"), CPU).parallel.kernel_canary == "auto"
    assert resolve_kernel(_config("parallel.kernel_canary=refuse"), CPU).parallel.kernel_canary == "refuse"
    assert resolve_kernel(_config("parallel.kernel_canary=off"), CPU).parallel.kernel_canary == "off"


def test_a_sound_kernel_says_nothing() -> None:
    config, report, warnings = _checked(_config())
    assert report is not None and report.experts_kernel == config.parallel.experts_kernel
    assert not warnings and not report.refused


def test_a_wrong_kernel_is_replaced_in_the_config_with_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter(["groups: the output of token 3 is off by 0.5 of its size", None])
    monkeypatch.setattr("trainer.parallel.canary.kernel_fault", lambda *args, **options: next(answers))
    chosen = resolve_kernel(_config(), CPU).parallel.experts_kernel
    config, report, warnings = _checked(_config())
    assert report is not None and config.parallel.experts_kernel == report.experts_kernel != chosen
    assert warnings == [
        f"parallel.experts_kernel: {chosen} is wrong on this device: groups: the output of token 3 is off by 0.5 of "
        f"its size; training with {report.experts_kernel} instead"
    ]


def test_the_kernels_that_are_checked_are_those_of_a_deterministic_run(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr("trainer.distributed.runtime.use_deterministic_kernels", lambda: calls.append("set"))
    monkeypatch.setattr("trainer.parallel.canary.kernel_fault", lambda *args, **options: calls.append("check"))
    _checked(_config("parallel.deterministic=true"))
    assert calls == ["set", "check"]


def test_a_dense_model_has_nothing_to_check() -> None:
    config, report, warnings = _checked(_config("model.moe=null"))
    assert report is None and not warnings and config.model.moe is None
