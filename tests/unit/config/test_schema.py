"""The JSON schema for editors, and the shipped configs."""

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tests.schema_leaves import leaves
from trainer.config.layers import ConfigFiles
from trainer.config.loader import load
from trainer.config.plugins import Pluggable
from trainer.config.schema import json_schema, schema_text
from trainer.config.slots import Slot
from trainer.errors import ConfigError
from trainer.experiment import ExperimentConfig

CONFIGS = Path(__file__).parents[3] / "configs"
SHIPPED = sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent.name != "sweeps")


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    schema = json_schema(ExperimentConfig)
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def test_the_committed_schema_is_the_generated_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without lazily imported kinds. To update it: python -m trainer config schema > configs/schema.json."""
    monkeypatch.setattr(Pluggable, "names", lambda _: [])
    assert (CONFIGS / "schema.json").read_text() == schema_text(ExperimentConfig)


def test_the_main_configs_are_shipped() -> None:
    assert {"smoke", "quickstart", "shakespeare_char", "moe_1b"} <= {path.stem for path in SHIPPED}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_a_shipped_config_is_valid(path: Path, validator: jsonschema.Draft202012Validator) -> None:
    if path.parent == CONFIGS:  # files in subfolders are bases: parts of a config
        assert load(path, [], ExperimentConfig).name == path.stem
    findings: list[Any] = []
    validator.validate(ConfigFiles(Slot(ExperimentConfig), findings).read(str(path)).plain())
    assert findings == []


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_a_shipped_config_has_the_schema_comment(path: Path) -> None:
    schema = "../" * (len(path.relative_to(CONFIGS).parts) - 1) + "schema.json"
    assert path.read_text().startswith(f"# yaml-language-server: $schema={schema}\n")


@pytest.mark.parametrize(
    "config",
    [
        {"name": "x"},
        {"base": "a.yaml"},
        {"base": ["a.yaml", "b.yaml"], "name": "x"},
        {"name": "x", "model": {"moe": None}},
        {"name": "x", "model": {"moe": {"router": {"top_k": 4}}}},
        {"name": "x", "schedule": {"kind": "warmup_stable_decay", "decay_fraction": 0.1}},
        {"name": "x", "data": {"sources": [{"kind": "text", "path": ["a", "b"]}]}},
        {"name": "x", "optim": {"betas": [0.9, 0.95]}, "train": {"grad_clip": 1}},
    ],
)
def test_the_schema_accepts_what_the_loader_accepts(validator: jsonschema.Draft202012Validator, config: Any) -> None:
    validator.validate(config)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"name": "../x"},
        {"name": "x", "trian": {}},
        {"name": "x", "base": []},
        {"name": "x", "model": {"moe": {"num_expert": 8}}},
        {"name": "x", "model": {"moe": {"num_experts": 0}}},
        {"name": "x", "model": {"moe": {"router": {"kind": "topp"}}}},
        {"name": "x", "schedule": {"kind": "warmup_cosine", "decay_fraction": 0.1}},
        {"name": "x", "data": {"sources": []}},
        {"name": "x", "data": {"sources": [{"path": "a"}]}},
        {"name": "x", "data": {"sources": [{"kind": "text"}]}},
        {"name": "x", "train": {"dtype": "fp16"}},
        {"name": "x", "optim": {"betas": [0.9]}},
    ],
)
def test_the_schema_refuses_what_the_loader_refuses(validator: jsonschema.Draft202012Validator, config: Any) -> None:
    assert not validator.is_valid(config)


def test_every_key_has_a_description() -> None:
    """Editors show descriptions on hover; `kind` needs none, since it names its section."""
    schema = json_schema(ExperimentConfig)
    for name, section in {"root": schema, **schema["$defs"]}.items():
        assert section["description"], name
        for key, value in section["properties"].items():
            assert key == "kind" or "description" in value or "$ref" in value, f"{name}.{key}"


def test_the_schema_is_free_of_openapi_keywords() -> None:
    text = schema_text(ExperimentConfig)
    assert '"discriminator"' not in text
    assert json.loads(text)["$schema"] == "https://json-schema.org/draft/2020-12/schema"


def test_every_list_can_be_written_in_yaml(tmp_path: Path) -> None:
    """YAML has no tuples, and a strict section takes nothing else for one."""
    lists = [leaf for leaf in leaves(ExperimentConfig) if leaf.is_list]
    assert {"pp_layers", "betas"} < {leaf.key for leaf in lists}
    for leaf in lists:
        (tmp_path / "x.yaml").write_text(json.dumps(leaf.document([], {"name": "x"})))
        try:
            load(tmp_path / "x.yaml", [], ExperimentConfig)
        except ConfigError as error:
            assert not re.search(r"got a list(?! of)", str(error)), leaf.name
