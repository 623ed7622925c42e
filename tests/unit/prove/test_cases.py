"""Tests for the layouts of a proof: each runs once."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.config.test_schema import SHIPPED
from trainer.config.loader import load
from trainer.experiment import ExperimentConfig
from trainer.parallel.config import RecomputeEveryConfig
from trainer.prove.all_cases import all_cases
from trainer.prove.cases import ENGINES, MAX_RANKS, MOST_RANKS, apply_case, in_dtype, reference
from trainer.prove.small_config import shrink


def config_of(moe: dict[str, Any] | None, *, rows: int) -> ExperimentConfig:
    """Return a config with this many rows per step."""
    values = {"name": "x", "model": {"moe": moe}, "train": {"global_batch_size": rows}}
    return ExperimentConfig.model_validate(values)


@pytest.mark.parametrize("kernel", ["grouped", "triton", "mxfp8", "loop"])
def test_a_proof_in_float64_takes_a_config_whose_kernel_has_no_float64(kernel: str) -> None:
    values = {"name": "x", "parallel": {"experts_kernel": kernel}, "train": {"dtype": "bfloat16"}}
    config = in_dtype(ExperimentConfig.model_validate(values), "float64")
    assert (config.train.dtype, config.parallel.experts_kernel) == ("float64", "mxfp8" if kernel == "mxfp8" else "auto")


@pytest.mark.parametrize(
    "moe",
    [
        None,
        {"num_experts": 1, "router": {"kind": "mixture_of_depths"}},
        {"num_experts": 6},
        {"num_experts": 4, "capacity": {"factor": 1.0}},
    ],
    ids=["dense", "one expert", "dropless", "with a capacity"],
)
def test_no_layout_is_run_twice_however_many_rows_a_step_has(moe: dict[str, Any] | None) -> None:
    for rows in range(1, 17):
        config = config_of(moe, rows=rows)
        for engines in (None, ["native"], ["deepspeed", "deepspeed"], list(ENGINES)):
            cases = all_cases(config, engines, MOST_RANKS if rows in (1, 7, 16) else MAX_RANKS)
            assert len({*cases}) == len({case.name for case in cases}) == len(cases), (rows, engines)
            assert reference(config) not in cases, (rows, engines)
            layouts = [(case.world_size, apply_case(config, case).model_dump_json()) for case in cases]
            assert len({*layouts}) == len(cases), (rows, engines)


def test_more_ranks_add_layouts_and_take_none_away() -> None:
    config = config_of({"num_experts": 8}, rows=32)
    few, many = all_cases(config), all_cases(config, None, MOST_RANKS)
    assert set(few) < set(many) and len(many) >= 95
    assert {case.world_size for case in many} == set(range(1, MOST_RANKS + 1))
    assert {case.world_size for case in few} == set(range(1, MAX_RANKS + 1))
    assert all(case.world_size <= 2 for case in all_cases(config, None, 2))
    degrees = {(case.ep_size > 1, case.data, case.cp_size > 1, case.pp_size > 1) for case in many}
    assert degrees >= {(True, "shard", True, False), (True, "shard", False, True), (True, "shard", True, True)}


def test_a_small_model_keeps_latent_attention_with_widths_that_differ() -> None:
    widths: dict[str, Any] = {"q_lora_rank": 1536}
    values = {"attention": {"latent": widths}, "moe": None}
    latent = shrink(ExperimentConfig.model_validate({"name": "x", "model": values})).model.attention.latent
    assert latent is not None and latent.q_lora_rank == 12
    assert (latent.kv_lora_rank, latent.qk_nope_head_dim, latent.qk_rope_head_dim, latent.v_head_dim) == (8, 6, 4, 10)
    widths |= {"q_lora_rank": None, "v_head_dim": 3}
    latent = shrink(ExperimentConfig.model_validate({"name": "x", "model": values})).model.attention.latent
    assert latent is not None and (latent.q_lora_rank, latent.v_head_dim) == (None, 3)


def test_a_small_model_has_rows_that_conversations_fit_into() -> None:
    for kind, seq_len in (("chat", 512), ("jsonl", 32)):
        data = {"sources": [{"kind": kind, "path": "a.jsonl"}], "packing": "bfd"}
        config = ExperimentConfig.model_validate({"name": "x", "model": {"seq_len": 512}, "data": data})
        assert shrink(config).model.seq_len == seq_len


@pytest.mark.parametrize(
    ("layers", "num_layers", "expected"),
    [([10, 20], 4, [1, 3]), ([3, 4, 9], 3, [1, 2]), ([0, 5], 3, [0, 2]), ([0, 1, 2, 3], 2, [0, 1]), ([7], 2, [1])],
)
def test_a_small_model_keeps_the_pattern_of_layers(layers: list[int], num_layers: int, expected: list[int]) -> None:
    values = {"num_layers": 24, "moe": {"layers": layers, "num_shared_experts": 1, "shared_d_ff": 999}}
    small = shrink(ExperimentConfig.model_validate({"name": "x", "model": values})).model
    assert small.moe_layers == tuple(expected) and small.num_layers == num_layers
    assert small.moe is not None and small.moe.shared_width == 48


@pytest.mark.parametrize(
    ("attention", "expected"),
    [
        ({"window": 4096, "window_pattern": ["full"] * 23 + ["sliding"]}, (8, None)),
        ({"window": 4096}, (8, 8)),
        ({"window": 3, "window_pattern": ["full", "sliding"]}, (3, None)),
        ({"head_dim": 44, "rotary_fraction": 0.7}, (None, None)),
        ({"head_dim": 128, "rotary_fraction": 0.5}, (None, None)),
        ({"head_dim": 64, "rotary_fraction": 0.04}, (None, None)),
    ],
)
def test_a_small_model_keeps_windows_and_rotated_parts(
    attention: dict[str, Any], expected: tuple[int | None, int | None]
) -> None:
    values = {"num_layers": 24, "d_model": 512, "moe": None, "attention": attention}
    small = shrink(ExperimentConfig.model_validate({"name": "x", "model": values})).model
    assert small.windows == expected and small.seq_len == 32
    share = small.rotary_width / small.head_dim
    assert share == pytest.approx(attention.get("rotary_fraction", 1.0), abs=2 / small.head_dim)
    assert (share == 1) == ("rotary_fraction" not in attention)


@pytest.mark.parametrize(("every", "of_small"), [(1, 1), (6, 2)])
def test_a_small_model_recomputes_a_block_if_the_large_one_does(every: int, of_small: int) -> None:
    values = {"name": "x", "model": {"num_layers": 6}, "parallel": {"recompute": {"every": every}}}
    small = shrink(ExperimentConfig.model_validate(values))
    assert small.model.num_layers == 2
    assert small.parallel.recompute == RecomputeEveryConfig(every=of_small)


def test_a_config_that_records_or_replays_is_also_proved_with_replayed_experts() -> None:
    values = {"name": "x", "train": {"global_batch_size": 4}}
    plain = ExperimentConfig.model_validate(values)
    recording = ExperimentConfig.model_validate({**values, "metrics": {"routing_record": {}}})
    cases = all_cases(recording)
    replayed = [case for case in cases if case.replays]
    assert [case for case in cases if not case.replays] == all_cases(plain)
    assert {(case.world_size, case.ep_size) for case in replayed} >= {(1, 1), (2, 2), (3, 1), (4, 2)}
    assert len({case.name for case in cases}) == len(cases)


_OVER_GPUS = {"ep_size": 2, "device": "cuda", "dispatcher": {"kind": "deepep"}}


@pytest.mark.parametrize(
    "parallel",
    [{"pp_size": 6}, {"pp_size": 2, "pp_layers": [2, 4]}, {"pp_size": 2, "pp_schedule": "zbv"}, _OVER_GPUS],
    ids=str,
)
def test_a_config_of_many_gpus_is_proved_on_this_machine(parallel: dict[str, Any]) -> None:
    values = {"name": "x", "model": {"num_layers": 6}, "train": {"dtype": "bfloat16"}, "parallel": parallel}
    config = ExperimentConfig.model_validate_json(json.dumps(values))
    for scaled in (config, shrink(config)):
        here = in_dtype(scaled, "float64")
        assert {case.dispatcher for case in all_cases(here)} == {
            "all_to_all",
            "all_gather",
            "deduplicated_all_to_all",
            "hierarchical",
        }
        assert apply_case(here, reference(here)).parallel.pp_size == 1


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_config_has_a_small_copy(path: Path) -> None:
    small = in_dtype(shrink(load(path, [], ExperimentConfig)), "float64")
    assert apply_case(small, reference(small)).model == small.model


def test_a_small_copy_is_not_refused_for_what_takes_no_part_in_a_step() -> None:
    task = {"kind": "generation", "name": "t", "prompt": "{a}", "references": ["{b}"], "max_new_tokens": 99}
    values = {"name": "x", "eval": {"tasks": [task | {"rows": {"kind": "jsonl", "path": "x.jsonl"}}]}}
    values |= {"checkpoint": {"best": "eval/t/rouge_l"}, "export": {"target": "qwen3_moe"}}
    values |= {"train": {"early_stopping": {"metric": "eval/t/rouge_l"}}, "model": {"qk_norm": True}}
    small = shrink(ExperimentConfig.model_validate(values))
    assert small.model.seq_len == 32 and not small.eval.tasks
