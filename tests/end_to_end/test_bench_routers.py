"""The router benchmarks as a user runs them: on synthetic logits, on those of a trained run, and by training."""

import json
import subprocess
from pathlib import Path

import pytest

from tests import imported_once

CONFIG = """\
name: tiny
seed: 3
model:
  num_layers: 1
  d_model: 16
  num_heads: 2
  seq_len: 16
  moe: {num_experts: 4, d_ff: 16, capacity: {factor: 1.25}}
data:
  sources: [{kind: text, path: text.txt, domain: prose}]
schedule: {kind: warmup_cosine, peak_lr: 1e-2, warmup_steps: 1}
train: {steps: 50, global_batch_size: 4}
eval: {every: null, max_tokens_per_domain: 256}
checkpoint: {every: null}
"""


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """Return a folder with a config and a repetitive text."""
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    (tmp_path / "text.txt").write_text("It was a bright cold day in April, and the clocks were striking. " * 100)
    return tmp_path


def bench(workplace: Path, arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `bench routers`."""
    return imported_once.run(["-m", "trainer", "bench", "routers", *arguments.split()], cwd=workplace)


def lines_of(result: subprocess.CompletedProcess[str], router: str) -> list[list[str]]:
    """Return the columns of a router's lines."""
    assert result.returncode == 0, result.stderr
    return [line.split() for line in result.stdout.splitlines() if line.split()[:1] == [router]]


def test_every_router_is_measured_on_the_same_logits(workplace: Path) -> None:
    result = bench(workplace, "--tokens 32 --sequences 2 --experts 6 --rounds 1 --json out.json --svg out.svg")
    found = json.loads((workplace / "out.json").read_text())
    assert found["options"]["num_experts"] == 6 and found["options"]["run"] is None
    choices = found["choices"]
    routers = list(dict.fromkeys(choice["router"] for choice in choices))
    assert len(choices) == 2 * len(routers) == 2 * 17
    for router in routers:
        assert len(lines_of(result, router)) == 2, "random and skewed"
    for choice in choices:
        assert set(choice["at"]) == {"1.0", "1.25"}
        assert all(at["gap"] >= -1e-12 for at in choice["at"].values())
    best = [at for choice in choices if choice["router"] == "linear_program" for at in choice["at"].values()]
    assert all(at["gap"] == pytest.approx(0, abs=1e-12) for at in best)
    assert lines_of(result, "top_k")[0][-1] == "1.00x"
    assert "* mixture_of_depths has one network and no choice between experts" in result.stdout
    assert (workplace / "out.svg").read_text().count('class="bar"') == 2 * 17 + 1


def test_routers_are_trained_once_and_a_trained_run_gives_logits(workplace: Path) -> None:
    arguments = "--train tiny.yaml --budget 640 --only top_k,hash --out runs/b --json out.json --svg out.svg"
    first = bench(workplace, f"{arguments} optim.weight_decay=0.0")
    assert [columns[0] for columns in (*lines_of(first, "top_k"), *lines_of(first, "hash"))] == ["top_k", "hash"]
    assert "[2/2] runs/b/hash-seed3: training for 10 steps" in first.stdout
    found = json.loads((workplace / "out.json").read_text())
    assert (found["tokens"], [one["router"] for one in found["routers"]]) == (640, ["top_k", "hash"])
    for one in found["routers"]:
        assert 0 < one["held_out_loss"] < 6 and one["load_imbalance"] >= 1 and one["width_per_token"] == 32
        logged = (workplace / "runs/b" / f"{one['router']}-seed3" / "metrics.jsonl").read_text().splitlines()
        assert json.loads(logged[-1])["eval/loss"] == one["held_out_loss"]
    assert ">hash<" in (workplace / "out.svg").read_text()

    before = sorted(path.stat().st_mtime_ns for path in workplace.glob("runs/b/*/metrics.jsonl"))
    again = bench(workplace, f"{arguments} optim.weight_decay=0.0")
    assert again.returncode == 0 and "training for" not in again.stdout
    assert sorted(path.stat().st_mtime_ns for path in workplace.glob("runs/b/*/metrics.jsonl")) == before
    assert json.loads((workplace / "out.json").read_text()) == found
    refused(bench(workplace, arguments), "top_k-seed3: was trained with optim.weight_decay 0.0, and the config has")

    traced = bench(workplace, "--run runs/b/top_k-seed3 --rounds 1 --only top_k,greedy --json out.json")
    assert len(lines_of(traced, "greedy")) == 3
    found = json.loads((workplace / "out.json").read_text())
    assert (found["options"]["num_experts"], found["options"]["tokens"]) == (4, 16)
    greedy, top_k = (
        next(c["at"]["1.0"] for c in found["choices"] if (c["logits"], c["router"]) == ("traced", router))
        for router in ("greedy", "top_k")
    )
    assert 0 <= greedy["gap"] <= top_k["gap"]
    refused(bench(workplace, "--run runs/b/hash-seed3"), "--run: its router, hash, computes no logits")


def test_a_full_disk_is_reported_and_nothing_is_left(workplace: Path) -> None:
    result = bench(workplace, "--tokens 8 --sequences 1 --rounds 1 --only top_k --json /dev/full")
    assert result.returncode == 7
    (line,) = result.stderr.strip().splitlines()
    assert "/dev/full: cannot be written: No space left on device; name another file" in line


def refused(result: subprocess.CompletedProcess[str], words: str) -> None:
    """Assert exit code 2 and one line."""
    assert result.returncode == 2, result.stderr
    (line,) = result.stderr.strip().splitlines()
    assert words in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--only top_k,nope", "--only: 'nope' is not a router; use some of top_k, "),
        ("--only mixture_of_depths", "--train compares it"),
        ("--experts 3 --top-k 4", "--top-k: 4 is more than 3 experts; use 1 to 3"),
        ("--rounds 0", "argument --rounds: must be a whole number of at least 1, got '0'"),
        ("--run runs/nobody", "runs/nobody: no such file"),
        ("--budget 100", "--budget: goes with --train; remove it"),
        ("train.steps=3", "train.steps=3: changes a config, and there is none without --train"),
        (
            "--svg nowhere/out.svg",
            "--svg: nowhere/out.svg: there is no folder nowhere; name a file in a folder that exists",
        ),
        ("--json out --svg ./out", "--svg: out is the file of --json; name another"),
        ("--train tiny.yaml --tokens 3", "--tokens: does not go with --train"),
        ("--train tiny.yaml model.moe=null", "model.moe: null leaves a router nothing to choose between"),
        ("--train nobody.yaml", "nobody.yaml: no such file"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(workplace: Path, arguments: str, words: str) -> None:
    refused(bench(workplace, arguments), words)
