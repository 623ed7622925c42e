"""Command-line overrides."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.config.base import Config
from trainer.config.dump import inline
from trainer.config.loader import load
from trainer.data.sources.registry import InstalledSourceConfig, TextSourceConfig
from trainer.errors import ConfigError
from trainer.experiment import ExperimentConfig
from trainer.moe.routers.config.fixed import RoundRobinRouterConfig
from trainer.moe.routers.config.token_choice import BiasBalancedRouterConfig, DenseRouterConfig
from trainer.optim.registry import WarmupStableDecayConfig

Loader = Callable[..., ExperimentConfig]
TEXT = "name: x\ndata: {sources: [{kind: text, path: a.txt}]}\nschedule: {kind: warmup_cosine, peak_lr: 0.5}\n"


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> Loader:
    """Return a function that loads TEXT with overrides."""
    path = tmp_path_factory.mktemp("overrides") / "x.yaml"
    path.write_text(TEXT)
    return lambda *overrides: load(path, overrides, ExperimentConfig)


def get(config: Any, key: str) -> Any:
    """Follow a dotted key."""
    for part in key.split("."):
        config = config[int(part)] if part.isdecimal() else getattr(config, part)
    return config


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.steps=4000", 4000),
        ("schedule.peak_lr=3e-4", 3e-4),
        ("name=no", "no"),
        ("runs_dir='5'", "5"),
        ("runs_dir=a=b", "a=b"),
        ("runs_dir= a b ", "a b"),
        ("model.qk_norm=true", True),
        ("model.num_kv_heads=null", None),
        ("eval.every=", None),
        ("optim.betas=[0.5, 0.6]", (0.5, 0.6)),
        ("data.sources.0.path=b.txt", "b.txt"),
        ("data.sources.0.path=[b.txt, c.txt]", ["b.txt", "c.txt"]),
    ],
)
def test_a_value_is_read_as_yaml(read: Loader, override: str, value: object) -> None:
    assert get(read(override), override.partition("=")[0]) == value


def test_the_last_of_two_overrides_of_a_key_wins(read: Loader) -> None:
    assert read("seed=1", "seed=2").seed == 2


def test_an_override_changes_only_its_key(read: Loader) -> None:
    config = read("schedule.warmup_steps=7")
    assert (config.schedule.warmup_steps, config.schedule.peak_lr) == (7, 0.5)


def test_a_mapping_merges_with_a_section_of_its_kind(read: Loader) -> None:
    assert read("schedule={warmup_steps: 7}").schedule.peak_lr == 0.5


def test_a_mapping_of_another_kind_replaces_the_section(read: Loader) -> None:
    assert read("schedule={kind: warmup_stable_decay}").schedule == WarmupStableDecayConfig()
    assert get(read("model.moe.router={kind: round_robin}"), "model.moe.router") == RoundRobinRouterConfig()


def test_another_kind_drops_the_options_of_the_file(read: Loader) -> None:
    assert read("schedule.kind=warmup_stable_decay").schedule == WarmupStableDecayConfig()


def test_the_same_kind_keeps_the_options_of_the_file(read: Loader) -> None:
    assert read("schedule.kind=warmup_cosine").schedule.peak_lr == 0.5


@pytest.mark.parametrize("order", [1, -1])
def test_options_of_a_new_kind_come_in_any_order(read: Loader, order: int) -> None:
    overrides = ["model.moe.router.kind=bias_balanced", "model.moe.router.top_k=4", "model.moe.router.score=softmax"]
    router = get(read(*overrides[::order]), "model.moe.router")
    assert router == BiasBalancedRouterConfig(top_k=4, score="softmax")


def test_a_kind_can_be_set_without_a_section_in_the_file(read: Loader) -> None:
    assert get(read("model.moe.router.kind=dense"), "model.moe.router") == DenseRouterConfig()


def test_an_option_can_be_set_without_a_kind(read: Loader) -> None:
    assert get(read("model.moe.router.top_k=4"), "model.moe.router.top_k") == 4


def test_a_key_below_null_starts_from_the_defaults(read: Loader) -> None:
    assert get(read("model.moe=null", "model.moe.num_experts=4"), "model.moe").model_dump() == {
        **get(read(), "model.moe").model_dump(),
        "num_experts": 4,
    }


def test_an_index_into_a_list_missing_from_the_file_starts_from_the_default(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("name: x")
    config = load(path, ["optim.betas.1=0.99", "data.sources.0.weight=2"], ExperimentConfig)
    assert get(config, "optim.betas") == (0.9, 0.99)
    assert config.data.sources == [InstalledSourceConfig(weight=2.0)]


def test_an_entry_may_become_another_kind(read: Loader) -> None:
    assert read("data.sources.0.kind=installed").data.sources == [InstalledSourceConfig()]


def test_a_whole_list_can_be_set(read: Loader) -> None:
    sources = read("data.sources=[{kind: text, path: b, domain: b}, {kind: installed}]").data.sources
    assert sources == [TextSourceConfig(path="b", domain="b"), InstalledSourceConfig()]


words = st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=40)
CHANGES: dict[str, st.SearchStrategy[Any]] = {
    "seed": st.integers(0, 2**63 - 1),
    "runs_dir": words,
    "data.sources.0.path": words | st.lists(words, min_size=1, max_size=3),
    "data.sources.0.weight": st.floats(1e-18, 1e18),
    "schedule.peak_lr": st.floats(0, 1e3, exclude_min=True),
    "train.dtype": st.sampled_from(["float32", "bfloat16", "float64"]),
    "train.grad_clip": st.none() | st.floats(1e-30, 1e30),
    "optim.betas": st.tuples(*[st.floats(0, 1, exclude_max=True)] * 2),
    "model.qk_norm": st.booleans(),
    "model.moe.balance.coef": st.floats(0, 1e6),
    "checkpoint.every": st.none() | st.integers(1, 10**9),
}


@given(changes=st.fixed_dictionaries({}, optional=CHANGES))
def test_any_value_written_inline_reads_back(read: Loader, changes: dict[str, Any]) -> None:
    config = read(*(f"{key}={inline(value)}" for key, value in changes.items()))
    assert {key: get(config, key) for key in changes} == changes
    assert isinstance(config, Config)


@pytest.mark.parametrize("word", ["train.steps", "train.steps:10", "train.steps 10", "s3://a/b", "C:", "bogus:10", "="])
def test_any_other_text_gets_the_form_of_an_override(read: Loader, word: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read("seed=1", word, "train.global_batch_size=x")
    assert str(caught.value).split("\n") == [
        f"<override 2>: '{word}' is not an override; write key=value, such as train.steps=100",
        "<override 3>: train.global_batch_size: expected a whole number, got 'x'",
    ]


@pytest.mark.parametrize("text", ["runs_dir=a = b", "runs_dir=c:d", "name=x", "data.sources.0.path=s3://a:b"])
def test_a_value_may_contain_equals_signs_and_colons(read: Loader, text: str) -> None:
    key, _, value = text.partition("=")
    assert get(read(text), key) == value
