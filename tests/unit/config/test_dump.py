"""Writing a configuration as YAML, and comparing two."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from trainer.config.dump import ABSENT, Change, changed_keys, diff, dump, inline
from trainer.config.loader import load
from trainer.data.config import DataConfig
from trainer.data.records.filters import FilterConfig
from trainer.data.sources.registry import InstalledSourceConfig, JsonlSourceConfig, TextSourceConfig
from trainer.engine.config import TrainConfig
from trainer.experiment import ExperimentConfig
from trainer.models.config import ModelConfig
from trainer.moe.config import MoEConfig
from trainer.moe.layer_options import BalanceConfig, CapacityConfig
from trainer.moe.routers.config.token_choice import BiasBalancedRouterConfig, DenseRouterConfig, TopKRouterConfig
from trainer.moe.routers.registry import RouterConfig
from trainer.optim.registry import AdamWConfig, WarmupCosineConfig, WarmupStableDecayConfig

Reader = Callable[[str], ExperimentConfig]


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    """Return a function that loads YAML text."""
    path = tmp_path_factory.mktemp("dump") / "config.yaml"

    def reader(text: str) -> ExperimentConfig:
        path.write_text(text, encoding="utf-8")
        return load(path, [], ExperimentConfig)

    return reader


def positive(most: float = 1e3, *, least: float = 5e-324) -> st.SearchStrategy[float]:
    return st.floats(least, most)


words = st.text(min_size=1, max_size=40)
paths = st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=40)
routers: st.SearchStrategy[RouterConfig] = st.one_of(
    st.builds(
        TopKRouterConfig, top_k=st.integers(2, 4), scale=positive(), score=st.sampled_from(["softmax", "sigmoid"])
    ),
    st.builds(BiasBalancedRouterConfig, top_k=st.integers(2, 4), bias_update_rate=positive(1)),
    st.builds(DenseRouterConfig),
)
columns = st.from_regex(r"[^{}:]{1,20}", fullmatch=True).filter(str.isprintable)
every_number = st.floats(allow_nan=False, allow_infinity=False)
filters = st.lists(st.builds(FilterConfig, column=words, at_least=every_number), max_size=1)
sources = st.tuples(
    st.builds(
        TextSourceConfig, path=paths | st.lists(paths, min_size=1, max_size=3), weight=positive(1e18, least=1e-18)
    ),
    st.builds(
        JsonlSourceConfig, path=paths, text=columns.map("{{{}}}".format), domain_key=st.none() | words, filters=filters
    ),
    st.builds(InstalledSourceConfig, domains=st.permutations(["python", "english", "cpp"])),
).flatmap(lambda all_kinds: st.permutations(all_kinds).map(list))
configs = st.builds(
    ExperimentConfig,
    name=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", fullmatch=True),
    runs_dir=paths,
    seed=st.integers(0, 2**63 - 1),
    model=st.builds(
        ModelConfig,
        norm_eps=positive(least=1e-30),
        qk_norm=st.booleans(),
        moe=st.none()
        | st.builds(
            MoEConfig,
            router=routers,
            balance=st.builds(BalanceConfig, coef=positive()),
            z_loss_coef=st.sampled_from([0.0, 1e-5]),
        ),
    ),
    data=st.builds(DataConfig, sources=sources, cache_dir=paths),
    optim=st.builds(AdamWConfig, eps=positive(least=1e-30), betas=st.tuples(*[st.floats(0, 1, exclude_max=True)] * 2)),
    schedule=st.builds(WarmupCosineConfig, peak_lr=positive()) | st.builds(WarmupStableDecayConfig, peak_lr=positive()),
    train=st.builds(TrainConfig, steps=st.integers(101, 10**9), grad_clip=st.none() | positive()),
)


@given(config=configs)
def test_a_dumped_config_loads_back_equal(read: Reader, config: ExperimentConfig) -> None:
    text = dump(config)
    again = read(text)
    assert again == config
    assert dump(again) == text


@given(config=configs)
def test_yaml_1_1_readers_read_the_same_values(config: ExperimentConfig) -> None:
    assert yaml.safe_load(dump(config)) == config.model_dump(mode="json")


@given(value=st.text() | st.floats() | st.integers() | st.booleans() | st.none())
def test_an_inline_value_is_one_line(value: Any) -> None:
    text = inline(value)
    assert "\n" not in text
    assert text.isprintable()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1e-5, "1.0e-05"),
        (1e22, "1.0e+22"),
        (1.5e-7, "1.5e-07"),
        (3.0, "3.0"),
        (True, "true"),
        (None, "null"),
        ("plain/path_1.txt", "plain/path_1.txt"),
        ("no", '"no"'),
        ("1e-3", '"1e-3"'),
        ("", '""'),
        ("a b", '"a b"'),
        ('say "\\"\n', r'"say \"\\\"\n"'),
        ("caf\u00e9 \u2028\U0001f600", '"caf\u00e9 \\u2028\U0001f600"'),
        ("\x85\x00", r'"\x85\x00"'),
        ((0.9, 0.95), "[0.9, 0.95]"),
        ({"top_k": 2, "kind": "top_k"}, "{kind: top_k, top_k: 2}"),
    ],
)
def test_values_are_written_in_their_shortest_readable_form(value: object, text: str) -> None:
    assert inline(value) == text


def test_sections_follow_the_schema_and_start_with_their_kind() -> None:
    lines = dump(ExperimentConfig(name="x")).splitlines()
    top = [line.partition(":")[0] for line in lines if not line.startswith(" ")]
    assert top == list(ExperimentConfig.model_fields)
    assert lines[lines.index("    router:") + 1] == "      kind: top_k"
    assert lines[lines.index("  sources:") + 1] == "    - kind: installed"


def test_equal_configs_have_no_changed_keys() -> None:
    assert changed_keys(ExperimentConfig(name="x"), ExperimentConfig(name="x")) == []


def test_a_change_has_the_key_and_both_values() -> None:
    old = ExperimentConfig(name="x", seed=1)
    new = ExperimentConfig(name="x", seed=2, schedule=WarmupCosineConfig(peak_lr=1e-5))
    assert changed_keys(old, new) == [Change("seed", 1, 2), Change("schedule.peak_lr", 1e-3, 1e-5)]
    assert diff(old, new) == ["seed: 1 -> 2", "schedule.peak_lr: 0.001 -> 1.0e-05"]


def test_an_option_of_one_kind_is_absent_from_the_other() -> None:
    old, new = ExperimentConfig(name="x"), ExperimentConfig(name="x", schedule=WarmupStableDecayConfig())
    assert diff(old, new) == [
        "schedule.kind: warmup_cosine -> warmup_stable_decay",
        "schedule.final_fraction: 0.1 -> 0.0",
        "schedule.decay_fraction: (absent) -> 0.2",
    ]
    assert Change("schedule.decay_fraction", 0.2, ABSENT) in changed_keys(new, old)


def test_a_section_that_is_null_in_one_config_is_one_change() -> None:
    dense = ExperimentConfig(name="x", model=ModelConfig(moe=None))
    assert [change.key for change in changed_keys(ExperimentConfig(name="x"), dense)] == ["model.moe"]
    (line,) = diff(dense, ExperimentConfig(name="x"))
    assert line.startswith("model.moe: null -> {first_dense_layers: 0, every: 1, ")
    assert line.endswith("...")


def test_list_entries_are_compared_one_by_one() -> None:
    text = TextSourceConfig(path="a.txt")
    one = ExperimentConfig(name="x", data=DataConfig(sources=[text]))
    two = ExperimentConfig(
        name="x", data=DataConfig(sources=[text.model_copy(update={"weight": 2.0}), InstalledSourceConfig()])
    )
    assert [change.key for change in changed_keys(one, two)] == ["data.sources.0.weight", "data.sources.1"]


def test_a_dump_ends_with_one_line_break(tmp_path: Path) -> None:
    text = dump(ExperimentConfig(name="x", model=ModelConfig(moe=MoEConfig(capacity=CapacityConfig(factor=1.25)))))
    assert text.endswith("\n") and not text.endswith("\n\n")
