"""The kernel of a run: chosen by the table, checked on the device, recorded as it is used."""

import contextlib
import io
from pathlib import Path

import pytest
import torch

from trainer.cli import main
from trainer.config.loader import load
from trainer.data.tokenizers.byte import ByteTokenizer
from trainer.distributed.mesh import Mesh
from trainer.errors import ConfigError
from trainer.experiment import ExperimentConfig
from trainer.parallel.canary import CanaryReport
from trainer.training.model import build_parallel_model, check_kernel, check_what_learns, resolve_kernel

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


@pytest.mark.parametrize("override", ["train.freeze=[blocks.9]", "train.lr_scale={blocks.9: 2}"])
def test_what_learns_is_checked_before_there_is_a_run_folder(override: str, tmp_path: Path) -> None:
    key = override.partition("=")[0]
    with pytest.raises(ConfigError, match=f"^{key}: blocks.9 matches no weight"):
        check_what_learns(_config(override))
    check_what_learns(_config("train.freeze=[router]", "train.lr_scale={experts: 2}"))
    text, screen = tmp_path / "x.txt", io.StringIO()
    text.write_text("words " * 500)
    sources = f"data.sources=[{{kind: text, path: {text}}}]"
    with contextlib.redirect_stderr(screen), pytest.raises(SystemExit, match=r"^2$"):
        main(["train", str(SMOKE), f"runs_dir={tmp_path}/runs", sources, override])
    assert f"{key}: blocks.9 matches no weight" in screen.getvalue() and not (tmp_path / "runs").exists()


def test_local_experts_and_shards_stay_frozen() -> None:
    config = resolve_kernel(_config("train.freeze=[experts, norms]"), CPU)
    model = build_parallel_model(config, ByteTokenizer(), Mesh.of_one(), CPU, warn=lambda _: None)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {n for n, _ in model.named_parameters() if "norm" in n or ".experts." in n}
