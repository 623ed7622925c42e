"""Refusal of configs that need a missing package, with the command that installs it."""

import pytest

from trainer.config.check_packages import check_packages
from trainer.engine.deepspeed.config import DeepSpeedEngineConfig
from trainer.errors import ConfigError
from trainer.evaluation.config import EvalConfig
from trainer.experiment import ExperimentConfig
from trainer.metrics.config import MetricsConfig, WandbConfig
from trainer.models.config import ModelConfig


@pytest.fixture
def nothing_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.packages.find_spec", lambda name: None)


def error_lines(config: ExperimentConfig) -> list[str]:
    with pytest.raises(ConfigError) as error:
        check_packages(config)
    return str(error.value).splitlines()


def router(kind: str) -> ModelConfig:
    options = {} if kind == "base" else {"top_k": 1}
    return ModelConfig.model_validate({"moe": {"num_experts": 4, "router": {"kind": kind, **options}}})


@pytest.mark.usefixtures("nothing_is_installed")
def test_the_default_config_needs_no_optional_package() -> None:
    check_packages(ExperimentConfig(name="x"))


@pytest.mark.usefixtures("nothing_is_installed")
@pytest.mark.parametrize(
    ("config", "line"),
    [
        (
            ExperimentConfig(name="x", metrics=MetricsConfig(wandb=WandbConfig(mode="offline"))),
            "metrics.wandb.mode: needs wandb, which is not installed; pip install wandb, or change this key",
        ),
        (
            ExperimentConfig(name="x", metrics=MetricsConfig(tensorboard=True)),
            "metrics.tensorboard: needs tensorboard, which is not installed; "
            "pip install 'turnout[tensorboard]', or change this key",
        ),
        (
            ExperimentConfig(name="x", metrics=MetricsConfig(routing_gap_every=10)),
            "metrics.routing_gap_every: needs scipy, which is not installed; "
            "pip install 'turnout[lab]', or change this key",
        ),
        (
            ExperimentConfig(name="x", model=router("linear_program")),
            "model.moe.router.kind: needs scipy, which is not installed; "
            "pip install 'turnout[lab]', or change this key",
        ),
        (
            ExperimentConfig(name="x", model=router("base")),
            "model.moe.router.kind: needs scipy, which is not installed; "
            "pip install 'turnout[lab]', or change this key",
        ),
        (
            ExperimentConfig(name="x", engine=DeepSpeedEngineConfig()),
            "engine.kind: needs deepspeed, which is not installed; pip install deepspeed, or change this key",
        ),
    ],
    ids=["wandb", "tensorboard", "routing_gap", "linear_program", "base", "deepspeed"],
)
def test_an_error_has_the_package_its_key_and_the_install_command(config: ExperimentConfig, line: str) -> None:
    assert error_lines(config) == [line]


@pytest.mark.usefixtures("nothing_is_installed")
def test_an_error_has_a_line_for_every_missing_package_of_a_task() -> None:
    task = {
        "kind": "generation",
        "name": "t",
        "rows": {"kind": "hf", "path": "json", "data_files": "x.json"},
        "prompt": "{a}",
        "references": ["{b}"],
        "metrics": ["bleu", "rouge", "exact_match"],
    }
    config = ExperimentConfig(name="x", eval=EvalConfig.model_validate({"tasks": [task]}))
    needed = [line.partition(",")[0] for line in error_lines(config)]
    assert needed == [
        "eval.tasks.0.metrics: needs sacrebleu",
        "eval.tasks.0.metrics: needs rouge_score",
        "eval.tasks.0.rows.kind: needs datasets",
    ]
    assert error_lines(config)[0].endswith("; pip install 'turnout[text-metrics]', or change this key")
