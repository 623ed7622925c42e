"""`bench layer`, `step`, `dispatch`, `memory` and `scaling` as a user runs them, on tiny shapes."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests import imported_once

SHAPE = "--experts 4 --top-k 2 --d-model 16 --d-ff 8 --tokens 32"
CONFIG = """\
name: tiny
model:
  num_layers: 1
  d_model: 16
  num_heads: 2
  seq_len: 16
  moe: {num_experts: 4, d_ff: 16}
data:
  sources: [{kind: text, path: text.txt, domain: prose}]
train: {steps: 2, global_batch_size: 4}
eval: {every: null, max_tokens_per_domain: 64}
parallel: {device: cpu, micro_batch_size: 2}
"""


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """Return a folder with a config and its text."""
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    (tmp_path / "text.txt").write_text("It was a bright cold day in April, and the clocks were striking. " * 100)
    return tmp_path


def turnout(workplace: Path, arguments: str) -> subprocess.CompletedProcess[str]:
    return imported_once.run(["-m", "trainer", *arguments.split()], cwd=workplace)


def measured(workplace: Path, arguments: str) -> list[dict[str, Any]]:
    """Run a benchmark; return its cases."""
    result = turnout(workplace, f"bench {arguments} --json out.json")
    assert result.returncode == 0, result.stderr
    found = json.loads((workplace / "out.json").read_text())
    assert found["command"] == arguments.split()[0]
    assert {"cores", "threads", "device", "torch", "python"} == set(found["machine"])
    for case in found["cases"]:
        assert case["title"] in result.stdout
        for entry in case["entries"]:
            assert entry["contender"] in result.stdout
    return found["cases"]


def by_name(case: dict[str, Any], **fields: Any) -> dict[str, dict[str, Any]]:
    """Return the entries of a case whose fields have these values, by contender."""
    return {
        entry["contender"]: entry
        for entry in case["entries"]
        if all(entry[name] == value for name, value in fields.items())
    }


@pytest.mark.nightly
def test_layer_compares_kernels_routings_and_peers(workplace: Path) -> None:
    (case,) = measured(workplace, f"layer {SHAPE} --rounds 2 --kernel loop,grouped --peers grouped_mm")
    assert {key: case[key] for key in ("top_k", "d_model", "d_ff", "tokens", "dtype")} == {
        **{"top_k": 2, "d_model": 16, "d_ff": 8, "tokens": 32},
        "dtype": "float32",
    }
    balanced, skewed = (by_name(case, routing=routing) for routing in ("balanced", "skewed"))
    assert list(skewed) == ["turnout, loop", "turnout, grouped", "products alone", "hf grouped_mm"]
    assert set(balanced) - set(skewed) == {"dense twin"}
    for entry in case["entries"]:
        assert len(entry["seconds"]) == 2 and entry["median_s"] > 0 and "error" not in entry
    loop, grouped = balanced["turnout, loop"], balanced["turnout, grouped"]
    assert loop["over_ours"] is None and len(grouped["over_ours"]) == 3
    assert loop["saved_bytes_per_token"] >= loop["least_saved_bytes_per_token"] == 4 * 16 + 4 * 2 * 2 * 8
    assert loop["peak_bytes"] > 0 and loop["waits"] >= 0
    assert skewed["turnout, loop"]["over_first_routing"] is not None and loop["over_first_routing"] is None


@pytest.mark.nightly
def test_numbers_of_experts_take_turns_and_a_config_gives_the_shape(workplace: Path) -> None:
    shape = "--experts 2,4 --top-k 1 --d-model 16 --d-ff 8 --tokens 32"
    (case,) = measured(workplace, f"layer {shape} --rounds 1 --kernel loop --peers none")
    assert [entry["num_experts"] for entry in case["entries"] if "turnout" in entry["contender"]] == [2, 2, 4, 4]
    assert all(entry["over_fewest_experts"] for entry in case["entries"] if entry["num_experts"] == 4)
    arguments = "layer tiny.yaml model.moe.d_ff=32 --rounds 1 --kernel loop --peers none --dtype float32,bfloat16"
    cases = measured(workplace, arguments)
    assert [(case["tokens"], case["d_ff"], case["dtype"]) for case in cases] == [
        (32, 32, "float32"),
        (32, 32, "bfloat16"),
    ]


@pytest.mark.nightly
def test_what_cannot_run_is_left_out_with_its_reason(workplace: Path) -> None:
    large = "--experts 8 --top-k 2 --d-model 64 --d-ff 512 --tokens 4096"
    arguments = f"bench layer {large} --rounds 1 --kernel loop --peers batched_mm --routing balanced"
    result = turnout(workplace, arguments)
    assert result.returncode == 0, result.stderr
    assert "* hf batched_mm is left out: would copy 3 GB of weights, one set for each row" in result.stdout


def test_traced_routing_comes_from_a_run(workplace: Path) -> None:
    assert turnout(workplace, "train tiny.yaml").returncode == 0
    arguments = "layer tiny.yaml --rounds 1 --kernel loop --peers none --routing balanced,traced:runs/tiny"
    (case,) = measured(workplace, arguments)
    assert set(by_name(case, routing="traced from runs/tiny")) == {"turnout, loop", "products alone"}
    result = turnout(workplace, "bench layer --experts 8 --tokens 32 --routing traced:runs/tiny")
    refused(result, "--routing: runs/tiny has 4 experts, not 8; use --experts 4")


@pytest.mark.nightly
@pytest.mark.slow
def test_memory_weighs_kernels_and_dispatchers(workplace: Path) -> None:
    one, two = measured(workplace, f"memory {SHAPE} --kernel loop,fused --peers eager --dispatcher all_to_all")
    assert list(by_name(one)) == ["turnout, loop", "turnout, fused", "dense twin", "hf eager"]
    assert two["ranks"] == 2 and list(by_name(two)) == ["turnout, all_to_all"]
    for entry in (*one["entries"], *two["entries"]):
        assert entry["seconds"] == [] and entry["median_s"] is None
        assert entry["saved_bytes_per_token"] >= entry["least_saved_bytes_per_token"] > 0


@pytest.mark.slow
def test_dispatch_counts_what_each_dispatcher_sends(workplace: Path) -> None:
    arguments = f"dispatch {SHAPE} --ranks 2,3 --rounds 1 --dispatcher all_to_all,all_gather --routing balanced"
    cases = measured(workplace, arguments)
    assert [case["ranks"] for case in cases] == [2, 3]
    for case in cases:
        some, everything = by_name(case)["turnout, all_to_all"], by_name(case)["turnout, all_gather"]
        assert 0 < some["least_row_bytes_per_token"] <= some["row_bytes_per_token"] < everything["row_bytes_per_token"]
        assert some["messages"] > 0 and len(some["seconds"]) == 1


@pytest.mark.nightly
@pytest.mark.slow
def test_step_compares_whole_models(workplace: Path) -> None:
    (case,) = measured(workplace, "step tiny.yaml --rounds 2 --threads 1 --routing own,skewed --peers eager")
    own, skewed = (by_name(case, routing=routing) for routing in ("own", "skewed"))
    assert list(own) == ["turnout", "dense twin", "hf eager"] and list(skewed) == ["turnout", "hf eager"]
    assert own["turnout"]["parameters"] == own["hf eager"]["parameters"]
    for entry in case["entries"]:
        assert len(entry["seconds"]) == 2 and entry["peak_bytes"] > 0 and entry["saved_bytes_per_token"] > 0
    assert own["turnout"]["threads"] == 1 and own["turnout"]["kernel"] != "auto"


@pytest.mark.nightly
@pytest.mark.slow
def test_scaling_compares_ranks_with_threads_and_deepspeed(workplace: Path) -> None:
    (case,) = measured(workplace, "scaling tiny.yaml parallel.micro_batch_size=1 --rounds 1")
    entries = by_name(case)
    assert list(entries) == [
        "turnout, one process of 2 threads",
        "turnout, 2 ranks",
        "turnout, 2 ranks, overlapped micro-batches",
        "turnout, 2 processes that exchange nothing",
        "turnout, DeepSpeed engine, ZeRO 1",
        "turnout, DeepSpeed engine, ZeRO 2",
        "DeepSpeed's own MoE, ZeRO 1",
    ]
    alone, together = list(entries.values())[:2]
    assert (alone["threads"], together["threads"]) == (2, 1)
    assert together["over_ours"] is not None and together["row_bytes_per_token"] > 0
    assert "row_bytes_per_token" not in entries["turnout, 2 processes that exchange nothing"]
    assert all(len(entry["seconds"]) == 1 for entry in entries.values())


def refused(result: subprocess.CompletedProcess[str], words: str) -> None:
    """Assert exit code 2 and one line."""
    assert result.returncode == 2, result.stderr
    (line,) = result.stderr.strip().splitlines()
    assert words in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("layer --experts 2 --top-k 4", "--top-k: 4 is more than 2 experts; use 1 to 2"),
        ("layer --d-model 15", "--d-model: 15 is odd; use an even number"),
        ("layer --experts 0", "argument --experts: must be a whole number of at least 1, got '0'"),
        ("layer --tokens 99999999999", "--experts: 8 of this size are more than a machine can hold"),
        ("layer --kernel nope", "--kernel: 'nope' is not a kernel; use some of auto, loop, "),
        ("layer --dtype float64", "--dtype: 'float64' is not a dtype; use some of float32, bfloat16"),
        ("layer --peers grouped_mm,x", "--peers: 'x' is not a peer; use some of grouped_mm, batched_mm, eager"),
        ("layer --routing own", "--routing: 'own' is not a routing; use some of balanced, skewed, traced:RUN"),
        ("layer --routing traced", "--routing: 'traced' is not a routing"),
        ("layer --routing traced:runs/nobody", "runs/nobody: no such file"),
        ("layer model.d_model=3", "model.d_model=3: changes a config, and there is none; name one first"),
        ("layer tiny.yaml --tokens 3", "--tokens: is taken from the config; remove it"),
        ("layer --json nowhere/out.json", "--json: nowhere/out.json: there is no folder nowhere"),
        ("dispatch --ranks 1", "--ranks: 1 ranks cannot share the experts; use 2 to 8"),
        ("dispatch --dispatcher local", "--dispatcher: 'local' is not a dispatcher; use some of all_to_all, "),
        ("dispatch --kernel loop,fused", "--kernel: 'loop,fused' are several; name one"),
        ("step tiny.yaml model.moe=null", "model.moe: null leaves no experts to measure"),
        ("step nobody.yaml", "nobody.yaml: no such file"),
        ("scaling tiny.yaml --ranks 5", "--ranks: 5 ranks cannot share the experts; use 2 to 4"),
        ("scaling tiny.yaml --ranks 3", "--ranks: 3 ranks leave 1 of 4 rows over; use a divisor of 4"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(workplace: Path, arguments: str, words: str) -> None:
    refused(turnout(workplace, f"bench {arguments}"), words)
