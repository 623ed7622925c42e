"""Loading files: YAML 1.2 scalars, base files, unreadable files, and the time of a failed start."""

import errno
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from trainer.config.loader import load
from trainer.config.yaml_nodes import resolve
from trainer.errors import ConfigError
from trainer.experiment import ExperimentConfig
from trainer.moe.routers.config.token_choice import BiasBalancedRouterConfig, TopKRouterConfig
from trainer.optim.registry import WarmupStableDecayConfig

Loader = Callable[..., ExperimentConfig]


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Loader:
    """Return a function that loads x.yaml with the given text, next to other files."""
    monkeypatch.chdir(tmp_path)

    def loader(text: str, *overrides: str, **files: str) -> ExperimentConfig:
        for name, content in {"x": text, **files}.items():
            Path(f"{name}.yaml").write_text(content)
        return load("x.yaml", overrides, ExperimentConfig)

    return loader


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("3e-4", 3e-4),
        ("1.0E5", 1e5),
        ("1.", 1.0),
        (".5", 0.5),
        ("-1.5e+3", -1500.0),
        ("+7", 7),
        ("010", 10),
        ("0o10", 8),
        ("0x1F", 31),
        ("true", True),
        ("True", True),
        ("FALSE", False),
        ("~", None),
        ("", None),
        ("Null", None),
        (".inf", math.inf),
        ("-.INF", -math.inf),
        ("9223372036854775807", 2**63 - 1),
    ],
)
def test_scalars_follow_the_core_schema(text: str, value: object) -> None:
    assert resolve(text) == value
    assert type(resolve(text)) is type(value)


@pytest.mark.parametrize(
    "text",
    [
        "no",
        "On",
        "yes",
        "off",
        "y",
        "1:30",
        "2024-01-01",
        "1_000",
        "1,000",
        "nan",
        "inf",
        "0b1",
        "1e",
        "e5",
        "tRUE",
        "=",
    ],
)
def test_all_other_scalars_are_text(text: str) -> None:
    assert resolve(text) == text


@pytest.mark.parametrize("text", ["9223372036854775808", "-9223372036854775809", "9" * 5000, "0x" + "f" * 5000])
def test_numbers_beyond_64_bits_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=text[:10]):
        resolve(text)


def test_quoted_scalars_are_text(read: Loader) -> None:
    assert read("name: '010'\nruns_dir: \"1e-3\"").name == "010"


def test_tags_of_the_core_schema_are_accepted(read: Loader) -> None:
    config = read("name: !!str 5\nseed: !!int '7'\nschedule: {peak_lr: !!float 1}\nmodel: !!map {moe: !!null ''}")
    assert (config.name, config.seed, config.schedule.peak_lr, config.model.moe) == ("5", 7, 1.0, None)


def test_an_alias_has_the_value_of_its_anchor(read: Loader) -> None:
    config = read("name: x\neval: {every: &n 50}\ncheckpoint: {every: *n}")
    assert config.checkpoint.every == 50


def test_a_file_overrides_its_base(read: Loader) -> None:
    config = read(
        "base: common.yaml\nname: x\ntrain: {steps: 300}",
        common="name: y\nseed: 7\ntrain: {steps: 200, dtype: bfloat16}",
    )
    assert (config.name, config.seed, config.train.steps, config.train.dtype) == ("x", 7, 300, "bfloat16")


def test_a_later_base_overrides_an_earlier_one(read: Loader) -> None:
    config = read("base: [a.yaml, b.yaml]\nname: x", a="seed: 1\nruns_dir: a", b="seed: 2")
    assert (config.seed, config.runs_dir) == (2, "a")


def test_bases_are_relative_to_the_file_that_names_them(read: Loader, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.yaml").write_text("base: b.yaml\nseed: 1")
    (tmp_path / "sub" / "b.yaml").write_text("runs_dir: b")
    config = read("base: sub/a.yaml\nname: x")
    assert (config.seed, config.runs_dir) == (1, "b")


def test_two_bases_may_share_a_base(read: Loader) -> None:
    assert read("base: [a.yaml, b.yaml]\nname: x", a="base: c.yaml", b="base: c.yaml", c="seed: 3").seed == 3


def test_a_list_replaces_the_list_of_the_base(read: Loader) -> None:
    config = read(
        "base: a.yaml\nname: x\ndata: {sources: [{kind: installed}]}",
        a="data: {cache_dir: c, sources: [{kind: text, path: a}, {kind: jsonl, path: b}]}",
    )
    assert [source.kind for source in config.data.sources] == ["installed"]
    assert config.data.cache_dir == "c"


def test_an_explicit_null_replaces_a_section(read: Loader) -> None:
    assert read("base: a.yaml\nname: x\nmodel: {moe: null}", a="model: {moe: {num_experts: 4}}").model.moe is None


def test_a_section_replaces_null(read: Loader) -> None:
    config = read("base: a.yaml\nname: x\nmodel: {moe: {num_experts: 4}}", a="model: {num_layers: 2, moe: null}")
    assert config.model.moe is not None
    assert (config.model.moe.num_experts, config.model.num_layers) == (4, 2)


def test_another_kind_drops_the_options_of_the_old_one(read: Loader) -> None:
    config = read(
        "base: a.yaml\nname: x\nschedule: {kind: warmup_stable_decay, decay_fraction: 0.3}",
        a="schedule: {kind: warmup_cosine, peak_lr: 0.5}",
    )
    assert config.schedule == WarmupStableDecayConfig(decay_fraction=0.3)


def test_the_same_kind_keeps_the_options(read: Loader) -> None:
    base = "schedule: {kind: warmup_stable_decay, peak_lr: 0.5}"
    with_kind = read("base: a.yaml\nname: x\nschedule: {kind: warmup_stable_decay, warmup_steps: 9}", a=base)
    without = read("base: a.yaml\nname: x\nschedule: {warmup_steps: 9}", a=base)
    assert with_kind.schedule == without.schedule == WarmupStableDecayConfig(peak_lr=0.5, warmup_steps=9)


def test_a_kind_may_be_omitted_if_it_has_a_default(read: Loader) -> None:
    config = read(
        "base: a.yaml\nname: x\nmodel: {moe: {router: {kind: top_k, jitter: 0.1}}}",
        a="model: {moe: {router: {top_k: 4}}}",
    )
    assert config.model.moe is not None
    assert config.model.moe.router == TopKRouterConfig(top_k=4, jitter=0.1)


def test_a_kind_over_the_default_kind_drops_its_options(read: Loader) -> None:
    config = read(
        "base: a.yaml\nname: x\nmodel: {moe: {router: {kind: bias_balanced}}}", a="model: {moe: {router: {top_k: 4}}}"
    )
    assert config.model.moe is not None
    assert config.model.moe.router == BiasBalancedRouterConfig()


def test_a_kind_of_a_single_section_keeps_the_other_keys(read: Loader) -> None:
    config = read("base: a.yaml\nname: x\ndata: {split: {kind: tail}}", a="data: {split: {kind: hash, fraction: 0.2}}")
    assert (config.data.split.kind, config.data.split.fraction) == ("tail", 0.2)


def test_a_wrong_value_that_a_later_layer_replaces_is_not_reported(read: Loader) -> None:
    assert read("base: a.yaml\nname: x\ntrain: {steps: 200}", a="train: {steps: many}").train.steps == 200


def test_a_path_object_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("name: x")
    assert load(path, [], ExperimentConfig).name == "x"


def test_a_missing_file_gets_the_similar_file(read: Loader) -> None:
    read("name: x", smoke="name: smoke")
    for name, hint in {"smok.yaml": "did you mean smoke.yaml?", "smoke.yml": "did you mean smoke.yaml?"}.items():
        with pytest.raises(ConfigError) as caught:
            load(name, [], ExperimentConfig)
        assert str(caught.value) == f"{name}: no such file; {hint}"


def test_a_leading_tilde_is_the_home_folder(read: Loader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    (home / "below").mkdir(parents=True)
    (home / "c.yaml").write_text("name: at-home\nseed: 5\n")
    (home / "below" / "d.yaml").write_text("base: ../c.yaml\nseed: 6\n")
    monkeypatch.setenv("HOME", str(home))
    assert read("base: ~/c.yaml").name == "at-home"
    assert read("base: [~/c.yaml, ~/below/d.yaml]").seed == 6
    assert load("~/below/d.yaml", [], ExperimentConfig).name == "at-home"
    with pytest.raises(ConfigError) as caught:
        read("base: ~/e.yaml")
    assert str(caught.value).startswith(f"x.yaml:1:7: base: {home}/e.yaml"[:60])
    assert "no such file" in str(caught.value)


@pytest.mark.parametrize("name", ["~\\0", "~\\ud800/c.yaml", "\\ud800", "~nobody-of-this-name/c.yaml"])
def test_an_impossible_file_name_is_a_one_line_error(read: Loader, name: str) -> None:
    with pytest.raises(ConfigError, match=r"^x\.yaml:1:7: base: .*(cannot be read|no such file)[^\n]*$"):
        read(f'base: "{name}"')


@pytest.mark.parametrize("address", ["https://x.org/c.yaml", "s3://bucket/a/c.yaml", "hf://user/c.yaml"])
def test_a_url_is_refused_as_such(read: Loader, address: str) -> None:
    message = f"{address}: is a URL, and a configuration is a local file; download it, and name the file"
    for given in (address, Path(address)):  # the latter with one slash
        with pytest.raises(ConfigError) as caught:
            load(given, [], ExperimentConfig)
        assert str(caught.value) == message
    with pytest.raises(ConfigError) as caught:
        read(f"base: {address}")
    assert str(caught.value) == f"x.yaml:1:7: base: {message}"


def test_a_base_that_links_to_itself_is_refused(read: Loader, tmp_path: Path) -> None:
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    with pytest.raises(ConfigError, match=r"^x\.yaml:1:7: base: loop\.yaml: cannot be read: "):
        read("base: loop.yaml\nname: x")


def test_a_missing_folder_is_reported(read: Loader) -> None:
    read("name: x")
    with pytest.raises(ConfigError) as caught:
        load("confgs/x.yaml", [], ExperimentConfig)
    assert str(caught.value) == "confgs/x.yaml: no such file; there is no folder confgs either"


def test_a_folder_is_refused(read: Loader) -> None:
    read("name: x")
    with pytest.raises(ConfigError) as caught:
        load(".", [], ExperimentConfig)
    assert str(caught.value) == ".: is a directory; name a .yaml file in it"


def test_a_file_without_read_permission_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, flags: int, *, through_links: bool) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("trainer.config.layers.open_regular", refuse)  # root, who may run the tests, can read any file
    with pytest.raises(ConfigError, match=r"^x\.yaml: cannot be read: Permission denied$"):
        load("x.yaml", [], ExperimentConfig)


def test_pipes_and_devices_are_refused_without_reading(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(ConfigError, match=r": is a pipe or a device; a configuration is a file$"):
            load(path, [], ExperimentConfig)


def _run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n", b"\r"])
def test_line_ends_and_byte_order_marks_of_other_systems_are_accepted(tmp_path: Path, line_end: bytes) -> None:
    text = "base: b.yaml\nname: x\nruns_dir: '\u65e5\u672c'\nmodel:\n  num_layers: 3\n"
    for mark in (b"", b"\xef\xbb\xbf"):
        (tmp_path / "b.yaml").write_bytes(mark + b"seed: 5\n".replace(b"\n", line_end))
        (tmp_path / "x.yaml").write_bytes(mark + text.encode().replace(b"\n", line_end))
        config = load(tmp_path / "x.yaml", [], ExperimentConfig)
        assert (config.name, config.runs_dir, config.model.num_layers, config.seed) == ("x", "\u65e5\u672c", 3, 5)


def test_loading_a_config_imports_no_torch() -> None:
    code = (
        "import sys, trainer.experiment, trainer.config.loader, trainer.config.dump, trainer.config.schema\n"
        "print(sorted({'torch', 'numpy', 'jsonschema', 'rich'} & set(sys.modules)))"
    )
    assert _run_python(code).stdout == "[]\n"


def test_a_wrong_config_costs_few_times_the_calls_of_importing_pydantic(tmp_path: Path) -> None:
    """Count what Python calls until the message, which depends on no machine; it takes some 0.4 s."""
    path = tmp_path / "x.yaml"
    path.write_text("name: x\nmodel: {moe: {num_expert: 8}}\n")
    counted = (
        "import sys\ncalls = 0\ndef count(frame, event, value):\n    global calls\n    calls += 1\n"
        "sys.setprofile(count)\n{}\nsys.setprofile(None)\nprint(calls, 'torch' in sys.modules, 'numpy' in sys.modules)"
    )
    ours = (
        "from trainer.config.loader import load\nfrom trainer.experiment import ExperimentConfig\n"
        "from trainer.errors import ConfigError\n"
        "try: load(sys.argv[1], [], ExperimentConfig)\nexcept ConfigError as error: print(error)"
    )
    a_model = "import yaml, pydantic\nclass Model(pydantic.BaseModel): number: int = 0"
    error, of_ours = _run_python(counted.format(ours), str(path)).stdout.splitlines()
    of_a_model = _run_python(counted.format(a_model)).stdout
    assert error.endswith("unknown key; did you mean num_experts?")
    assert of_ours.split()[1:] == ["False", "False"]
    assert int(of_ours.split()[0]) < 4.5 * int(of_a_model.split()[0]), "it was 3.6 times"


@pytest.mark.parametrize(("text", "depth"), [("[", 3000), ("{a: ", 3000), ("- ", 3000)])
def test_too_deep_a_file_is_one_line(text: str, depth: int, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(f"name: {text * depth}")
    with pytest.raises(ConfigError, match=r"x\.yaml:1:\d+: (nested too deeply|not valid YAML)"):
        load(tmp_path / "x.yaml", [], ExperimentConfig)


def test_an_endless_file_is_too_large(tmp_path: Path) -> None:
    with (tmp_path / "large.yaml").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ConfigError, match=r"large\.yaml: more than 1048576 bytes"):
        load(tmp_path / "large.yaml", [], ExperimentConfig)
