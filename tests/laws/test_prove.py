"""Law: `prove` accepts every correct layout, and detects and names each planted fault."""

import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from tests.mutations import (
    IN_DEEPSPEED,
    NAMED,
    bias_by_rank,
    dense_gradients_not_summed,
    experts_seeded_by_rank,
    norm_of_one_rank,
    router_gradients_doubled,
    skipped_collective,
)
from tests.registries import DISPATCHERS
from tests.samples import nightly_but
from trainer.engine.deepspeed.config import DeepSpeedEngineConfig
from trainer.engine.native import NativeEngine
from trainer.errors import CommError
from trainer.experiment import ExperimentConfig
from trainer.prove.all_cases import all_cases
from trainer.prove.cases import Case, labels, reference
from trainer.prove.compare import compare
from trainer.prove.evidence import Evidence
from trainer.prove.pool import LocalRanks
from trainer.prove.proof import prove
from trainer.prove.rounding import FLOORS
from trainer.prove.run_case import run_case

pytestmark = pytest.mark.slow

STEPS, TOLERANCE, TIMEOUT_S = 3, 1e-9, 120.0
PARTS = ("4 ranks, ep 2", "1 rank, ", "2 ranks, ep 1", "2 ranks, ep 2", "3 ranks", "4 ranks, ep 1", "4 ranks, ep 4")
"""Parts of the names of all layouts. The first two have every dimension and kind of option between them."""
BEYOND_LABELS = (dense_gradients_not_summed, norm_of_one_rank, experts_seeded_by_rank, bias_by_rank)
"""Faults that no labelled setting explains, so that they fail even with a label."""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ExperimentConfig:
    """Six experts with uneven load, capacity, selection bias, jitter and every loss; seven rows, weighted documents."""
    folder = tmp_path_factory.mktemp("prove")
    sentence = "It was a bright cold day in April, and the clocks were striking. " * 2
    rows = [{"text": f"{n}: {sentence}", "gain": (0, 0.3, 1, 2.25)[n % 4]} for n in range(100)]
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ExperimentConfig.model_validate(
        {
            "name": "tiny",
            "model": {
                "num_layers": 2,
                "d_model": 16,
                "num_heads": 2,
                "seq_len": 16,
                "init_std": 0.3,
                "moe": {
                    "num_experts": 6,
                    "d_ff": 12,
                    "router": {"kind": "bias_balanced", "jitter": 0.2, "bias_update_rate": 0.05},
                    "capacity": {"factor": 1.0, "min": 1},
                    "balance": {"coef": 0.1},
                },
            },
            "data": {
                "sources": [{"kind": "jsonl", "path": str(folder / "text.jsonl"), "weight_key": "gain"}],
                "cache_dir": str(folder / "cache"),
            },
            "schedule": {"kind": "warmup_cosine", "warmup_steps": 1},
            "train": {"steps": 10, "global_batch_size": 7, "dtype": "float64", "grad_clip": 0.1},
        }
    )


@pytest.fixture(scope="module")
def oracle(config: ExperimentConfig) -> Evidence:
    return run_case(config, reference(config), LocalRanks(), steps=STEPS, timeout_s=TIMEOUT_S)


def test_the_matrix_has_every_degree_and_dispatcher(config: ExperimentConfig) -> None:
    cases = all_cases(config)
    assert len(cases) >= 12
    assert {(c.world_size, c.ep_size) for c in cases} == {
        (1, 1),
        (2, 1),
        (2, 2),
        (3, 1),
        (3, 3),
        (4, 1),
        (4, 2),
        (4, 4),
    }
    assert {c.dispatcher for c in cases} == set(DISPATCHERS) - {"local"}
    assert all(sum(part in case.name for part in PARTS) == 1 for case in cases)
    assert labels(config) == []


@pytest.mark.parametrize("part", nightly_but(PARTS[:2], PARTS))
def test_every_layout_is_equal(
    config: ExperimentConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], part: str
) -> None:
    code = prove(
        config,
        steps=STEPS,
        dtype="float64",
        engines=None,
        is_small=False,
        only=part,
        json_path=tmp_path / "proof.json",
        timeout_s=TIMEOUT_S,
    )
    output = capsys.readouterr().out
    assert code == 0, output
    record = json.loads((tmp_path / "proof.json").read_text())
    assert len(record["layouts"]) == sum(part in case.name for case in all_cases(config)) == output.count("  equal")
    assert all(layout["equal"] and max(layout["worst"].values()) <= TOLERANCE for layout in record["layouts"])
    assert all(layout["flips"] == 0 for layout in record["layouts"])


@pytest.mark.parametrize("fault", NAMED, ids=lambda fault: fault.__name__)
def test_a_planted_fault_is_caught_and_named(
    config: ExperimentConfig, oracle: Evidence, fault: Callable[[], None]
) -> None:
    case = Case(world_size=2, ep_size=2, micro_batch_size=4)
    try:
        # A rank that waits for a collective which never comes waits this long.
        timeout_s = 15.0 if fault is skipped_collective else TIMEOUT_S
        with closing(LocalRanks()) as ranks:  # of its own: a fault stays where it was planted
            mine = run_case(config, case, ranks, steps=STEPS, timeout_s=timeout_s, prepare=fault)
    except CommError as error:
        assert NAMED[fault] in str(error)
        return
    comparison = compare(mine, oracle, tolerance=TOLERANCE, floor=FLOORS["float64"])
    assert not comparison.is_equal and comparison.is_beyond_labels == (fault in BEYOND_LABELS)
    assert comparison.cause is not None and NAMED[fault] in comparison.cause, comparison


def test_a_millionth_of_a_gradient_that_is_doubled_is_caught_and_named(
    config: ExperimentConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rounding floor is far below any gradient that matters."""
    values = config.model_dump()
    values["model"]["moe"] |= {"z_loss_coef": 0.0}
    values["model"]["moe"]["balance"]["coef"] = 0.0
    values["model"]["moe"]["router"]["scale"] = 1e-6  # of the combine weights, and so of what the router learns by
    config = ExperimentConfig.model_validate(values)
    oracle = run_case(config, reference(config), LocalRanks(), steps=2, timeout_s=TIMEOUT_S)
    gate = float(oracle.gradients["blocks.1.ffn.router.gate.weight"].norm())
    assert 1e-8 < gate / oracle.grad_norms[0] < 1e-5
    monkeypatch.setattr(NativeEngine, "_reduce_gradients", NativeEngine._reduce_gradients)  # put back after the test
    router_gradients_doubled()
    mine = run_case(config, Case(micro_batch_size=4), LocalRanks(), steps=2, timeout_s=TIMEOUT_S)
    comparison = compare(mine, oracle, tolerance=TOLERANCE, floor=FLOORS["float64"])
    assert comparison.first_different is not None and "router" in comparison.first_different
    assert comparison.cause is not None and "router gradients are 2 times those of one process" in comparison.cause


def test_steps_without_targets_are_equal(config: ExperimentConfig, tmp_path: Path) -> None:
    """Prompts longer than a row: the first steps have no targets, and their gradient is only rounding error."""
    rows = [{"q": f"{'what is it that nobody ever asks ' * 3}{n}?", "a": "yes"} for n in range(60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = config.model_dump()
    values["model"] |= {"num_layers": 1, "seq_len": 8}
    router = {"kind": "expert_choice", "capacity_factor": 1.5, "top_k": 4}
    values["model"]["moe"] |= {"router": router, "z_loss_coef": 0.0, "capacity": {}, "balance": {"coef": 0.3}}
    source = {"kind": "jsonl", "path": str(tmp_path / "rows.jsonl"), "prompt": "{q}", "text": "{a}", "domain": "qa"}
    values["data"] = {"sources": [source], "cache_dir": str(tmp_path / "cache")}
    values["train"] |= {"global_batch_size": 3}
    config = ExperimentConfig.model_validate(values)
    oracle = run_case(config, reference(config), LocalRanks(), steps=10, timeout_s=TIMEOUT_S)
    without = [norm for norm, loss in zip(oracle.grad_norms, oracle.losses, strict=True) if loss == 0]
    assert without and 0 < max(without) < 1e-14 and max(oracle.losses) > 1
    assert _exit_code(config, steps=10, only="1 rank") == 0


def test_a_labelled_difference_passes(config: ExperimentConfig, capsys: pytest.CaptureFixture[str]) -> None:
    values = config.model_dump()
    values["model"]["moe"] |= {"balance": {"coef": 0.0, "scope": "micro_batch"}}
    values["model"]["moe"]["device_balance"] = {"coef": 0.2, "groups": 2}
    config = ExperimentConfig.model_validate(values)
    assert _exit_code(config, steps=1, only="1 rank") == 0
    printed, progress = capsys.readouterr()
    assert printed.count("differs, as labelled") == 2
    assert "model.moe.balance.scope: micro_batch (device_balance_loss): not layout-invariant by definition" in printed
    assert [line.split(", after ")[0] for line in progress.splitlines()] == ["0 of 2", "1 of 2", "2 of 2"]


def _exit_code(config: ExperimentConfig, *, steps: int, only: str) -> int:
    return prove(
        config,
        steps=steps,
        dtype="float64",
        engines=None,
        is_small=False,
        only=only,
        json_path=None,
        timeout_s=TIMEOUT_S,
    )


def test_deepspeed_is_an_axis_of_the_matrix(config: ExperimentConfig) -> None:
    native, both = all_cases(config), all_cases(config, ["native", "deepspeed"])
    added = [case for case in both if case not in native]
    assert [case for case in both if case in native] == native
    assert all_cases(config, ["deepspeed"]) == added
    layouts = {(c.world_size, c.ep_size, c.zero_stage) for c in added}
    degrees = {(c.world_size, c.ep_size) for c in native}
    assert layouts == {(*degree, stage) for degree in degrees for stage in (1, 2)}
    assert all(case.engine == "deepspeed" and "ZeRO" in case.name and case.data == "replicate" for case in added)
    mine = config.model_copy(update={"engine": DeepSpeedEngineConfig(zero_stage=2)})
    assert {case.zero_stage for case in all_cases(mine)} == {2}


def test_every_layout_is_equal_under_deepspeed(
    config: ExperimentConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = prove(
        config,
        steps=STEPS,
        dtype=None,
        engines=["deepspeed"],
        is_small=False,
        only="2 ranks, ep 2",
        json_path=tmp_path / "proof.json",
        timeout_s=TIMEOUT_S,
    )
    output = capsys.readouterr().out
    assert code == 0, output
    layouts = json.loads((tmp_path / "proof.json").read_text())["layouts"]
    assert "in float32" in output and len(layouts) == output.count("  equal") == 8
    assert {(layout["engine"], layout["zero_stage"]) for layout in layouts} == {("deepspeed", 1), ("deepspeed", 2)}


@pytest.fixture(scope="module")
def single(config: ExperimentConfig) -> ExperimentConfig:
    """The config in single precision, as DeepSpeed sums gradients."""
    train = {**config.train.model_dump(), "dtype": "float32"}
    return ExperimentConfig.model_validate({**config.model_dump(), "train": train})


@pytest.fixture(scope="module")
def single_oracle(single: ExperimentConfig) -> Evidence:
    return run_case(single, reference(single), LocalRanks(), steps=STEPS, timeout_s=TIMEOUT_S)


@pytest.mark.parametrize(
    ("fault", "said"), list(IN_DEEPSPEED.items()), ids=lambda value: getattr(value, "__name__", "")
)
def test_deepspeed_s_own_mistakes_are_caught_and_named(
    single: ExperimentConfig, single_oracle: Evidence, fault: Callable[[], None], said: str
) -> None:
    case = Case(world_size=2, ep_size=2, micro_batch_size=2, zero_stage=1)
    with closing(LocalRanks()) as ranks:
        mine = run_case(single, case, ranks, steps=STEPS, timeout_s=TIMEOUT_S, prepare=fault)
    comparison = compare(mine, single_oracle, tolerance=1e-5, floor=FLOORS["float32"])
    assert not comparison.is_equal
    assert comparison.cause is not None and said in comparison.cause, comparison
