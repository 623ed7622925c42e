"""Plug-ins by module:Class, by entry point and from the table of lazily imported kinds."""

import json
import pickle
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import jsonschema
import pytest

from trainer.config import plugins
from trainer.config.dump import dump
from trainer.config.loader import load
from trainer.config.schema import json_schema
from trainer.errors import ConfigError
from trainer.experiment import ExperimentConfig
from trainer.lab.router_configs import router_class, router_kinds, select_kinds
from trainer.moe.routers.registry import ROUTER_MODULES
from trainer.prove.all_cases import all_cases
from trainer.prove.cases import apply_case
from trainer.prove.small_config import shrink

PACKAGE = Path(__file__).parents[2] / "plugin_router"
PATH = "my_router.threshold:ThresholdRouterConfig"


@pytest.fixture(autouse=True)
def in_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run in the folder of the package, as its user would."""
    monkeypatch.chdir(PACKAGE)
    monkeypatch.setattr(sys, "path", list(sys.path))


def experiment(*overrides: str, kind: str = PATH) -> ExperimentConfig:
    return load("run.yaml", [f"model.moe.router.kind={kind}", *overrides], ExperimentConfig)


def message(*overrides: str, kind: str = PATH) -> str:
    with pytest.raises(ConfigError) as error:
        experiment(*overrides, kind=kind)
    return str(error.value)


def test_a_kind_can_be_a_class_in_a_module() -> None:
    config = experiment("model.moe.router.threshold=0.5")
    assert config.model.moe is not None
    router = config.model.moe.router
    assert (type(router).__name__, router.kind, router.model_dump()["threshold"]) == (
        "ThresholdRouterConfig",
        PATH,
        0.5,
    )


def test_a_dumped_config_loads_back_equal(tmp_path: Path) -> None:
    config = experiment()
    (tmp_path / "config.yaml").write_text(dump(config))
    assert load(tmp_path / "config.yaml", [], ExperimentConfig) == config
    assert pickle.loads(pickle.dumps(config)) == config
    assert ExperimentConfig.model_validate(config.model_dump()) == config


def test_a_config_made_in_python_has_its_kind() -> None:
    section = router_class(PATH)
    assert section().kind == PATH
    moe = experiment().model.moe
    assert moe is not None
    assert type(moe).model_validate({**moe.model_dump(), "router": section()}).router == section()


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("threshold=abc", "<override 2>: model.moe.router.threshold: expected a number, got 'abc'"),
        ("thresold=0.1", "<override 2>: model.moe.router.thresold: unknown key; did you mean threshold?"),
        (
            "jitter=0.1",
            "<override 2>: model.moe.router.jitter: unknown key for kind: ThresholdRouterConfig; it is an option of ",
        ),
    ],
)
def test_errors_in_options_read_like_those_of_built_in_kinds(override: str, expected: str) -> None:
    assert message(f"model.moe.router.{override}").startswith(expected)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (
            "my_router.threshold:ThresholdRouter",
            "ThresholdRouter is not a config class of turnout.routers; derive it from",
        ),
        ("my_router.threshold:ThresholdConfig", "has no ThresholdConfig; did you mean ThresholdRouterConfig?"),
        ("my_router.treshold:X", f"there is no module my_router.treshold in {PACKAGE} or among the installed packages"),
        ("my_rooter.threshold:X", "there is no module my_rooter in "),
        ("my_router.threshold:1", "'my_router.threshold:1' is not of the form module:name"),
        (
            "trainer.moe.routers.config.token_choice:TopKRouterConfig",
            "TopKRouterConfig has a field kind of its own (top_k)",
        ),
        ("topk", "'topk' is not one of top_k, bias_balanced, "),
    ],
)
def test_an_unusable_kind_is_reported_at_its_key(kind: str, expected: str) -> None:
    text = message(kind=kind)
    assert text.startswith("<override 1>: model.moe.router.kind: ") and expected in text
    assert "\n" not in text


def test_an_import_error_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken_plugin.py").write_text("raise RuntimeError('no luck')")
    assert "module broken_plugin cannot be imported: RuntimeError: no luck" in message(kind="broken_plugin:X")
    (tmp_path / "needy_plugin.py").write_text("import not_installed_anywhere")
    assert "needy_plugin imports not_installed_anywhere, which is not installed" in message(kind="needy_plugin:X")


def test_a_plugin_written_as_text_gets_a_hint() -> None:
    assert f"write {{kind: '{PATH}'}}" in message(f"model.moe.router={PATH}", kind="top_k")


def test_a_kind_can_be_an_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EntryPoint(name="threshold", value=PATH, group="turnout.routers")
    monkeypatch.setattr(plugins, "_entry_points", lambda group: {"threshold": entry} if group == "routers" else {})
    config = experiment(kind="threshold")
    assert config.model.moe is not None and config.model.moe.router.kind == "threshold"
    assert "round_robin, threshold; did you mean threshold?" in message(kind="treshold")
    validator = jsonschema.Draft202012Validator(json_schema(ExperimentConfig))
    assert validator.is_valid(json.loads(config.model_dump_json()))
    router = {"kind": "threshold", "thresold": 1}
    assert not validator.is_valid({"name": "x", "model": {"moe": {"router": router}}})


def test_the_schema_accepts_every_plugin() -> None:
    validator = jsonschema.Draft202012Validator(json_schema(ExperimentConfig))
    for values in (
        {"model": {"moe": {"router": {"kind": PATH, "threshold": 0.5}}}},
        {"optim": {"kind": "my.module:Lion"}},
        {"data": {"sources": [{"kind": "my.module:Source", "path": "x"}]}},
        {"metrics": {"trackers": [{"kind": "my.module:Tracker"}]}},
        {"parallel": {"experts_kernel": "my.module:kernel"}},
    ):
        assert validator.is_valid({"name": "x", **values}), values
    assert not validator.is_valid({"name": "x", "model": {"moe": {"router": {"kind": "not_there"}}}})


def test_an_entry_in_the_table_adds_a_router(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ROUTER_MODULES, "threshold", PATH)
    config = experiment(kind="threshold")
    assert config.model.moe is not None and config.model.moe.router.kind == "threshold"
    assert router_kinds()[-1] == "threshold" and select_kinds("threshold,top_k", router_kinds()) == [
        "top_k",
        "threshold",
    ]
    assert router_class("threshold") is type(config.model.moe.router)
    cases = all_cases(shrink(config))
    assert all(apply_case(config, case).model.moe == config.model.moe for case in cases)


def test_bench_accepts_a_plugin_by_name() -> None:
    assert select_kinds(f"top_k,{PATH}", router_kinds()) == ["top_k", PATH]
    with pytest.raises(ConfigError, match="--only: there is no module nowhere"):
        select_kinds("nowhere:X", router_kinds())


def test_an_experts_kernel_can_be_a_function() -> None:
    assert experiment("parallel.experts_kernel=trainer.ops.expert_ffn:loop_ffn").parallel.experts_kernel.endswith(
        ":loop_ffn"
    )
    text = message("parallel.experts_kernel=trainer.ops.expert_ffn:lop_ffn")
    assert (
        text
        == "<override 2>: parallel.experts_kernel: module trainer.ops.expert_ffn has no lop_ffn; did you mean loop_ffn?"
    )
    assert "'lop' is not one of auto, loop" in message("parallel.experts_kernel=lop")


def test_an_optimizer_plugin_needs_the_native_engine() -> None:
    lion = "optim.kind=tests.unit.contracts.test_plugin:SGDConfig"
    assert experiment(lion).optim.kind == lion.removeprefix("optim.kind=")
    assert "the DeepSpeed engine has adamw; use engine.kind native" in message(lion, "engine.kind=deepspeed")


def test_a_tracker_must_be_a_plugin() -> None:
    text = message("metrics.trackers=[{kind: csv}]")
    assert "metrics.trackers.0.kind: no tracker has this name; write my_package.module:ClassConfig" in text
