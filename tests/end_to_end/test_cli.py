"""The command line as a user runs it: train, stop, resume, break things, read one line that says what to do."""

import importlib.util
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from tests import imported_once
from tests.held_steps import HeldSteps
from tests.ignore_clock import without_clock
from tests.launched_ranks import ROOT

CONFIG = """\
name: tiny
seed: 3
model:
  num_layers: 2
  d_model: 32
  num_heads: 2
  d_ff: 64
  seq_len: 32
  moe: {num_experts: 4, d_ff: 32, router: {kind: bias_balanced, jitter: 0.1}, capacity: {factor: 1.5}}
data:
  sources: [{kind: text, path: text.txt, domain: prose}]
schedule: {kind: warmup_cosine, peak_lr: 1e-2, warmup_steps: 2}
train: {steps: 20, global_batch_size: 8}
eval: {every: 10, max_tokens_per_domain: 512}
parallel: {micro_batch_size: 4}
checkpoint: {every: 10, keep: 2}
metrics: {log_every: 1}
"""


# Each takes 0.1 to 2 s to import, and none is needed unless a tokenizer, source, task, engine or tracker asks for it.
CHOSEN = {
    "datasets",
    "deepspeed",
    "jsonschema",
    "lm_eval",
    "pandas",
    "pyarrow",
    "rouge_score",
    "sacrebleu",
    "scipy",
    "sklearn",
    "tensorboard",
    "tokenizers",
    "transformers",
    "wandb",
    "zstandard",
}


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """A folder with a config and a text that repeats itself."""
    return make_workplace(tmp_path)


def make_workplace(folder: Path) -> Path:
    """Write a config and a text."""
    (folder / "tiny.yaml").write_text(CONFIG)
    (folder / "text.txt").write_text("It was a bright cold day in April, and the clocks were striking. " * 200)
    return folder


def run(workplace: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command."""
    return imported_once.run(["-m", "trainer", *arguments], cwd=workplace)


def run_cold(
    workplace: Path, *arguments: str, environment: Mapping[str, str] = MappingProxyType({}), **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run a command in a process that imports everything itself."""
    return subprocess.run(
        _command(*arguments),
        cwd=workplace,
        env={**_environment(), **environment},
        capture_output=True,
        text=True,
        timeout=200,
        **options,
    )


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "trainer", *arguments]


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def stop_at(
    workplace: Path, arguments: Sequence[str], words: str, number: signal.Signals, *, held: int
) -> subprocess.CompletedProcess[str]:
    """Train and send a signal as soon as the output has `words`: before step `held` is taken."""
    stdout, stderr = workplace / "stdout", workplace / "stderr"
    process = imported_once.Process(
        ["-m", "trainer", "train", "tiny.yaml", *arguments],
        cwd=workplace,
        stdout=stdout,
        stderr=stderr,
        environment=HeldSteps(workplace / "held", (held,)).environment(),
    )
    try:
        while not stdout.exists() or words not in stdout.read_text():
            assert process.poll() is None, stderr.read_text()
            time.sleep(0.01)
        process.send_signal(number)
        code = process.wait(100)
    finally:
        process.kill()
    return subprocess.CompletedProcess(arguments, code, stdout.read_text(), stderr.read_text())


def refused(result: subprocess.CompletedProcess[str], code: int, *patterns: str) -> None:
    """Assert an exit code and, for each pattern, one line on standard error; and that nobody sees a traceback."""
    lines = result.stderr.strip().splitlines()
    assert result.returncode == code, result.stderr
    assert len(lines) == len(patterns), result.stderr
    for line, pattern in zip(lines, patterns, strict=True):
        assert re.search(pattern, line), f"{line!r} does not match {pattern!r}"
    assert "Traceback" not in result.stdout


def metrics(workplace: Path, name: str = "tiny") -> list[dict]:
    """The training lines of metrics.jsonl, without what depends on the clock."""
    lines = (workplace / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [without_clock(json.loads(line)) for line in lines]


def report(workplace: Path) -> str:
    """The page that a run leaves in its folder, which is the newest of its starts."""
    return (workplace / "runs/tiny/report.html").read_text()


def checkpoints(workplace: Path) -> Sequence[str]:
    """Names in the checkpoint folder."""
    return sorted(p.name for p in (workplace / "runs/tiny/checkpoints").iterdir())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A workplace and a run in it by a process that imported everything itself, and wrote down what."""
    workplace = make_workplace(tmp_path_factory.mktemp("trained"))
    return workplace, run_cold(workplace, "train", "tiny.yaml", environment={"PYTHONPROFILEIMPORTTIME": "1"})


def test_a_run_trains_evaluates_saves_and_shows_what_it_learned(
    trained: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    workplace, result = trained
    assert result.returncode == 0, result.stderr
    for words in ("training tiny", "held out", "unigram", "prose", "experts by domain", "sample", "runs/tiny"):
        assert words in result.stdout
    records = metrics(workplace)
    training = [r for r in records if "loss" in r]
    assert [r["step"] for r in training] == list(range(1, 21))
    assert training[-1]["loss"] < training[0]["loss"] - 0.5
    expected = {"step", "tokens", "loss", "balance_loss", "z_loss", "grad_norm", "lr", "drop_rate", "load_imbalance"}
    expected |= {"dead_experts", "experts_per_token", "router_entropy", "skipped_steps", "loss_spikes", "alarms"}
    assert expected == set(training[0])
    evaluations = [r for r in records if "eval/loss" in r]
    assert [r["step"] for r in evaluations] == [10, 20]
    assert {"eval/bits_per_byte", "eval/loss_capacity", "eval/prose/loss"} <= set(evaluations[0])
    assert checkpoints(workplace) == ["step_00000010", "step_00000020"]
    folder = workplace / "runs/tiny"
    assert json.loads((folder / "environment.json").read_text())["world_size"] == 1
    assert "experts_kernel: auto" not in (folder / "config.yaml").read_text()
    routing = json.loads((folder / "routing.jsonl").read_text().splitlines()[0])
    assert sum(routing["counts"][0]) == 8 * 32 * 2
    assert result.stdout.endswith("  report      runs/tiny/report.html\n") and "20 of 20" in report(workplace)


def test_a_run_imports_no_large_package_that_it_does_not_use(
    trained: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    _, result = trained
    lines = [line.rpartition("|")[2].strip() for line in result.stderr.splitlines() if line.startswith("import time:")]
    imported = {name.partition(".")[0] for name in lines}
    assert {"torch", "numpy", "rich", "safetensors"} < imported, "what it does use"
    parts = {"sympy", "torch._dynamo", "torch._inductor", "torch.distributed.tensor"}
    assert sorted(parts & set(lines)) == [], "a third of the time until the first step"
    assert [name for name in CHOSEN if importlib.util.find_spec(name) is None] == [], (
        "a name of nothing is not imported"
    )
    assert sorted(imported & CHOSEN) == []


def test_a_run_s_own_config_gives_the_same_run(workplace: Path) -> None:
    assert run(workplace, "train", "tiny.yaml").returncode == 0
    assert run(workplace, "train", "runs/tiny/config.yaml", "name=again").returncode == 0
    assert metrics(workplace) == metrics(workplace, "again")


def test_ten_steps_and_ten_more_are_twenty_bit_for_bit(workplace: Path) -> None:
    assert run(workplace, "train", "tiny.yaml", "name=whole").returncode == 0
    # The schedule must be that of 20 steps in both halves,
    # so the first half is stopped by its checkpoint, not by steps.
    # At any moment after step 10: what was written since is thrown away and done again.
    assert stop_at(workplace, (), "saved", signal.SIGKILL, held=18).returncode == -signal.SIGKILL
    result = run(workplace, "train", "tiny.yaml")
    assert result.returncode == 0 and "resuming from" in result.stdout
    assert [r for r in metrics(workplace) if "loss" in r] == [r for r in metrics(workplace, "whole") if "loss" in r]
    whole, halves = (
        json.loads((workplace / "runs" / n / "checkpoints/step_00000020/manifest.json").read_text())["files"]
        for n in ("whole", "tiny")
    )
    assert whole == halves, "the hashes of the weights and moments"


def test_ctrl_c_saves_and_the_run_goes_on(workplace: Path) -> None:
    assert run(workplace, "train", "tiny.yaml", "name=whole", "eval.every=null").returncode == 0
    arguments = ("eval.every=null", "checkpoint.every=null")
    stopped = stop_at(workplace, arguments, "step 15 ", signal.SIGINT, held=17)
    assert stopped.returncode == 75, stopped.stderr
    assert "stopped by SIGINT" in stopped.stdout and stopped.stderr == ""
    assert len(checkpoints(workplace)) == 1 and re.search("<bdi>1[5-7] of 20</bdi>", report(workplace))
    assert run(workplace, "train", "tiny.yaml", *arguments).returncode == 0
    assert "20 of 20" in report(workplace)
    whole = [r["loss"] for r in metrics(workplace, "whole") if "loss" in r]
    assert [r["loss"] for r in metrics(workplace) if "loss" in r] == whole


def test_a_finished_run_says_so_and_trains_no_further(workplace: Path) -> None:
    assert run(workplace, "train", "tiny.yaml", "train.steps=5").returncode == 0
    before = metrics(workplace)
    again = run(workplace, "train", "tiny.yaml", "train.steps=5")
    assert again.returncode == 0 and "resuming from" in again.stdout
    assert metrics(workplace) == before


def test_eval_and_generate_read_a_run_folder(workplace: Path) -> None:
    assert run(workplace, "train", "tiny.yaml").returncode == 0
    result = run_cold(workplace, "eval", "runs/tiny", "--json")
    assert result.returncode == 0, result.stderr
    numbers = json.loads(result.stdout)  # nothing else is on standard output
    assert "experts by domain" in result.stderr
    logged = [r for r in metrics(workplace) if "eval/loss" in r][-1]
    assert numbers["eval/loss"] == logged["eval/loss"] and numbers["step"] == 20
    texts = [
        run(workplace, "generate", "tiny.yaml", "--prompt", "It was", "--max-tokens", "40", "--seed", seed)
        for seed in ("1", "1", "2")
    ]
    assert all(t.returncode == 0 and t.stdout.startswith("It was") for t in texts), texts[0].stderr
    assert texts[0].stdout == texts[1].stdout != texts[2].stdout
    greedy = run_cold(workplace, "generate", "runs/tiny", "--greedy", "--step", "10")
    assert greedy.returncode == 0
    refused(run(workplace, "generate", "runs/tiny", "--step", "7"), 4, r"has no checkpoint of step 7; it has 10, 20")
    for wrong, message in (
        (["--top-p", "2"], r"--top-p: 2 is not more than 0 and at most 1"),
        (["--temperature", "nan"], r"--temperature: nan is not a finite number of at least 0"),
        (["--top-k", "0"], r"--top-k: must be a whole number of at least 1, got '0'"),
        (["--seed", "99999999999999999999"], r"--seed: must be below 2\^63, got '99999999999999999999'"),
    ):
        refused(run(workplace, "generate", "runs/tiny", *wrong), 2, message)
    bytes_of_no_text = run(workplace, "generate", "runs/tiny", "--prompt", "\udcff", "--max-tokens", "3")
    assert bytes_of_no_text.returncode == 0, bytes_of_no_text.stderr


BAD_CONFIGS = {
    "unknown key": (["model.moe.num_expert=4"], r"num_expert: unknown key; did you mean num_experts\?"),
    "more experts per token than experts": (
        ["model.moe.router={top_k: 9}"],
        r"router\.top_k: 9 is more than num_experts 4",
    ),
    "a router without gradient": (
        ["model.moe.router={kind: top_k, top_k: 1}"],
        r"normalize: true with top_k 1 .*set normalize: false",
    ),
    "a kernel without that dtype": (
        ["parallel.experts_kernel=grouped", "train.dtype=float64"],
        r"parallel\.experts_kernel: grouped does not support float64; use auto",
    ),
    "a kernel of float32 and bfloat16": (
        ["parallel.experts_kernel=triton", "train.dtype=float64"],
        r"parallel\.experts_kernel: triton does not support float64; use auto",
    ),
    "a kernel of bfloat16": (
        ["parallel.experts_kernel=scattermoe"],
        r"parallel\.experts_kernel: scattermoe does not support float32; use auto",
    ),
    "a kernel without that activation": (
        ["parallel.experts_kernel=sonicmoe", "train.dtype=bfloat16", "model.activation=gelu"],
        r"parallel\.experts_kernel: sonicmoe has swiglu, and model\.activation is gelu; use auto",
    ),
    "a kernel in blocks of 32": (
        ["parallel.experts_kernel=mxfp8", "parallel.device=cpu", "model.d_model=48", "model.num_heads=4"],
        r"parallel\.experts_kernel: mxfp8 needs model\.d_model to be a multiple of 32 in \w+, not 48; use auto",
    ),
    "a kernel with products in bfloat16": (
        ["parallel.experts_kernel=mxfp8", "train.dtype=float32"],
        r"mxfp8 has products in bfloat16, and train\.dtype is float32; use train\.dtype=bfloat16, or ",
    ),
    "negative capacity": (["model.moe.capacity.factor=-1"], r"capacity\.factor: must be more than 0, got -1"),
}


@pytest.mark.parametrize(("overrides", "message"), BAD_CONFIGS.values(), ids=BAD_CONFIGS.keys())
def test_a_bad_config_is_one_line_and_exit_2(workplace: Path, overrides: list[str], message: str) -> None:
    refused(run(workplace, "train", "tiny.yaml", *overrides), 2, message)
    assert not (workplace / "runs").exists()


BAD_TEXTS = {
    "missing": (None, r"text\.txt: .*(no such file|not found|does not exist)"),
    "empty": (b"", r"text\.txt: .*empty"),
    "not UTF-8": (b"fine so far \xff\xfe and then not\n" * 50, r"text\.txt:1: byte 0xff at offset 12 is not UTF-8"),
    "too short": (b"short", r"prose"),
}


@pytest.mark.parametrize(("content", "message"), BAD_TEXTS.values(), ids=BAD_TEXTS.keys())
def test_a_bad_text_is_one_line_and_exit_3(workplace: Path, content: bytes | None, message: str) -> None:
    (workplace / "text.txt").unlink()
    if content is not None:
        (workplace / "text.txt").write_bytes(content)
    refused(run(workplace, "train", "tiny.yaml"), 3, message)


def test_a_run_folder_is_used_from_anywhere_and_wherever_it_was_moved_with_its_text(workplace: Path) -> None:
    project, elsewhere = workplace / "project", workplace / "elsewhere"
    project.mkdir()
    elsewhere.mkdir()
    for name in ("tiny.yaml", "text.txt"):
        (workplace / name).rename(project / name)
    assert run(project, "train", "tiny.yaml", "train.steps=10").returncode == 0
    result = run(elsewhere, "train", "../project/runs/tiny", "train.steps=12")
    assert result.returncode == 0, result.stderr
    assert "resuming from" in result.stdout and not list(elsewhere.iterdir())
    project.rename(workplace / "moved")
    numbers = run(elsewhere, "eval", str(workplace / "moved/runs/tiny"), "--json")
    assert numbers.returncode == 0, numbers.stderr
    assert json.loads(numbers.stdout)["step"] == 12 and "trained on other text" not in numbers.stderr
    assert not list(elsewhere.iterdir()) and len(list((workplace / "moved/.cache/tokens").glob("*.lock"))) == 2
    refused(
        run(elsewhere, "train", "../moved/runs/tiny", "name=b"),
        2,
        r"is a run folder, and the overrides name another run;",
    )


def test_rows_that_cannot_be_used_are_left_out_said_and_listed(workplace: Path) -> None:
    rows = [json.dumps({"text": f"It was a bright cold day in April, number {i}. " * 9}) for i in range(60)]
    (workplace / "rows.jsonl").write_text("\n".join([*rows, '{"text": null}', "{"]) + "\n")
    source = "data.sources=[{kind: jsonl, path: rows.jsonl, domain: prose}]"
    refused(run(workplace, "train", "tiny.yaml", source), 3, r"^rows\.jsonl:61: 'text' is null; it must be a string")
    skips = [source, "data.sources.0.on_bad_row=skip"]
    result = run(workplace, "train", "tiny.yaml", *skips, "train.steps=3")
    assert result.returncode == 0, result.stderr
    said = [line for line in result.stdout.splitlines() if "left out" in line]
    assert said == [
        "warning: left out 2 records that cannot be used (1 not JSON, 1 of another type), of data.sources 0: "
        "runs/tiny/skipped_rows.jsonl"
    ]
    (line,) = (workplace / "runs/tiny/skipped_rows.jsonl").read_text().splitlines()
    listed = json.loads(line)
    assert (listed["source"], listed["rows"], len(listed["first"])) == (0, 2, 2)
    assert listed["first"][1].startswith("rows.jsonl:62: not JSON (")
    (workplace / "rows.jsonl").write_text("\n".join(rows[1:]) + "\n")
    refused(run(workplace, "train", "tiny.yaml", *skips, "train.steps=4"), 3, r"was trained on other text")


def test_a_flipped_bit_of_the_token_cache_is_exit_3_wherever_the_run_meets_it(workplace: Path) -> None:
    (workplace / "text.txt").write_text("It was a bright cold day in April, and the clocks were striking. " * 8000)
    assert run(workplace, "train", "tiny.yaml", "train.steps=3").returncode == 0
    (tokens,) = (workplace / ".cache/tokens").glob("*/prose.train.tokens")
    content = bytearray(tokens.read_bytes())
    content[300_000] ^= 4
    tokens.write_bytes(content)
    cache = tokens.parent.relative_to(workplace)
    message = rf"^{cache}/prose\.train\.tokens: bytes 262144 to 327679 are not what was written .* remove {cache}, and"
    refused(run(workplace, "train", "tiny.yaml", "train.steps=20"), 3, message)
    (held_out,) = (workplace / ".cache/tokens").glob("*/prose.validation.tokens")
    held_out.write_bytes(held_out.read_bytes().swapcase())
    refused(run(workplace, "eval", "runs/tiny"), 3, r"prose\.validation\.tokens: its content is not what was written")


def _damage_newest(workplace: Path) -> Path:
    newest = sorted((workplace / "runs/tiny/checkpoints").iterdir())[-1]
    file = next(newest.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-7] ^= 4
    file.write_bytes(data)
    return newest


def test_a_corrupted_checkpoint_is_passed_over_or_exit_4_and_nothing_is_lost(workplace: Path) -> None:
    assert run(workplace, "train", "tiny.yaml").returncode == 0
    weights = (workplace / "runs/tiny/checkpoints/step_00000020/manifest.json").read_text()
    _damage_newest(workplace)
    refused(run(workplace, "eval", "runs/tiny", "--step", "20"), 4, r"step_00000020.*is damaged \(its SHA-256")
    result = run(workplace, "train", "tiny.yaml")
    assert result.returncode == 0 and "using step 10 instead" in result.stdout
    again = (workplace / "runs/tiny/checkpoints/step_00000020/manifest.json").read_text()
    assert json.loads(again)["files"] == json.loads(weights)["files"], "done again, bit for bit"

    for step in (workplace / "runs/tiny/checkpoints").iterdir():
        (step / "manifest.json").write_text("{}")
    before = checkpoints(workplace)
    refused(run(workplace, "train", "tiny.yaml"), 4, r"step_00000020.*step_00000010.*no other checkpoint is left")
    assert checkpoints(workplace) == before


def test_a_run_folder_of_a_different_model_is_refused_and_left_alone(workplace: Path) -> None:
    assert run(workplace, "train", "tiny.yaml").returncode == 0
    before = metrics(workplace)
    result = run(workplace, "train", "tiny.yaml", "model.d_model=64", "model.moe.num_experts=8")
    refused(result, 2, r"runs/tiny: was written with model\.d_model 32, the config has 64", r"num_experts 4.*has 8")
    assert metrics(workplace) == before
    (workplace / "runs/tiny/config.yaml").unlink()  # even without its config, the checkpoint tells
    refused(run(workplace, "train", "tiny.yaml", "model.d_model=64"), 4, r"written by a different model")


def test_a_run_on_other_text_is_refused(workplace: Path) -> None:
    assert run(workplace, "train", "tiny.yaml").returncode == 0
    (workplace / "text.txt").write_text("Another text altogether, long enough to be cut into rows. " * 100)
    refused(run(workplace, "train", "tiny.yaml", "train.steps=25"), 3, r"was trained on other text")


def test_a_changed_learning_rate_is_a_warning(workplace: Path) -> None:
    assert run(workplace, "train", "tiny.yaml").returncode == 0
    result = run(workplace, "train", "tiny.yaml", "train.steps=25", "schedule.peak_lr=5e-3")
    assert result.returncode == 0 and "schedule.peak_lr was 0.01" in result.stdout


def test_a_full_disk_while_saving_leaves_older_checkpoints_and_exits_7(workplace: Path) -> None:
    first = run(workplace, "train", "tiny.yaml", "train.steps=10", "schedule.warmup_steps=2")
    assert first.returncode == 0
    size = max(f.stat().st_size for f in (workplace / "runs/tiny/checkpoints/step_00000010").iterdir())
    overrides = ["checkpoint.every=5", "checkpoint.retry_s=0"]

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, size - 1))

    result = run_cold(workplace, "launch", "tiny.yaml", *overrides, preexec_fn=limit)  # and does not start it again
    assert re.search(r"step 15 not saved: .*; earlier checkpoints are intact\n", result.stdout)
    refused(result, 7, r"step 20 not saved: .*earlier checkpoints are intact: free some space and start the run again")
    assert checkpoints(workplace) == ["step_00000010"]
    assert run(workplace, "train", "tiny.yaml").returncode == 0, "with room again, the run is finished"


def test_two_runs_cannot_write_into_one_folder(workplace: Path) -> None:
    endless = ["-m", "trainer", "train", "tiny.yaml", "train.steps=1000000", "eval.every=null"]
    process = imported_once.Process(endless, cwd=workplace)
    try:
        while not (workplace / "runs/tiny/metrics.jsonl").exists():
            assert process.poll() is None
            time.sleep(0.01)
        refused(
            run(workplace, "train", "tiny.yaml", "train.steps=1000000"),
            2,
            r"runs/tiny: .* process \d+ is training into it",
        )
    finally:
        process.kill()


def test_without_a_compiler_compile_says_so_once_and_goes_on(workplace: Path) -> None:
    empty = workplace / "bin"
    empty.mkdir()
    result = subprocess.run(
        _command("train", "tiny.yaml", "parallel.compile=true", "train.steps=5"),
        cwd=workplace,
        env={**_environment(), "PATH": str(empty), "CXX": ""},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("needs a C++ compiler") == 1


def test_config_verbs_show_compare_and_describe(workplace: Path) -> None:
    shown = run(workplace, "config", "show", "tiny.yaml", "train.steps=7")
    assert shown.returncode == 0 and "steps: 7" in shown.stdout and "z_loss_coef" in shown.stdout
    (workplace / "other.yaml").write_text(shown.stdout)
    difference = run(workplace, "config", "diff", "tiny.yaml", "other.yaml")
    assert difference.stdout.strip() == "train.steps: 20 -> 7"
    schema = json.loads(run(workplace, "config", "schema").stdout)
    assert "model" in schema["properties"]


def test_a_reader_that_leaves_ends_the_output_and_not_with_a_traceback(workplace: Path) -> None:
    assert run(workplace, "train", "tiny.yaml", "train.steps=5").returncode == 0
    generate = " ".join(_command("generate", "runs/tiny", "--max-tokens", "3000"))
    piped = ["bash", "-c", f"set -o pipefail; {generate} | head -c 10"]
    result = subprocess.run(piped, cwd=workplace, env=_environment(), capture_output=True, timeout=100)
    assert result.returncode == 0 and result.stderr == b"" and len(result.stdout) == 10


def test_a_model_that_does_not_fit_is_exit_7(workplace: Path) -> None:
    huge = ["model.d_model=4194304", "model.num_heads=2", "model.moe=null", "model.num_layers=1"]
    result = run(workplace, "train", "tiny.yaml", *huge)
    refused(result, 7, r"tiny: needs at least 1\.13 PB of memory \(1\.13 PB for weights with gradients and moments\)")
    projected = ["model.d_model=8192", "model.d_ff=8", "model.moe.router={kind: cosine, d_proj: 16777216}"]
    result = run(workplace, "train", "tiny.yaml", *projected, "model.num_layers=1", "model.moe.d_ff=8")
    # what only torch finds
    refused(result, 7, r"out of memory while making the weights \(\d+\.\dM .*allocate.*; make the model smaller")
    assert "micro_batch_size" not in result.stderr, "which does not help there"


def test_a_stop_at_an_evaluated_step_loses_no_evaluation(workplace: Path) -> None:
    arguments = ("eval.every=1", "checkpoint.every=null")
    stopped = stop_at(workplace, arguments, "held out", signal.SIGTERM, held=10)
    assert stopped.returncode == 75, stopped.stderr
    assert run(workplace, "train", "tiny.yaml", *arguments).returncode == 0
    assert [r["step"] for r in metrics(workplace) if "eval/loss" in r] == list(range(1, 21))


def test_evaluating_on_other_text_is_allowed_with_a_warning(workplace: Path) -> None:
    assert run(workplace, "train", "tiny.yaml", "train.steps=5").returncode == 0
    (workplace / "other.txt").write_text("Another text altogether, long enough to be cut into rows. " * 100)
    result = run(workplace, "eval", "runs/tiny", "--json", "data.sources.0.path=other.txt")
    assert result.returncode == 0 and "the run was trained on other text" in result.stderr
    refused(run(workplace, "eval", "runs/tiny", "model.d_model=64"), 2, r"was written with model\.d_model 32")


def test_a_damaged_record_of_the_run_s_config_says_what_to_do(workplace: Path) -> None:
    assert run(workplace, "train", "tiny.yaml", "train.steps=5").returncode == 0
    (workplace / "runs/tiny/config.yaml").write_text("")
    refused(
        run(workplace, "train", "tiny.yaml", "train.steps=5"), 2, r"config\.yaml.*empty", r"remove it if it is damaged"
    )


def test_a_path_that_cannot_be_used_is_one_line(workplace: Path) -> None:
    (workplace / "runs").write_text("a file where a folder should be")
    result = run(workplace, "train", "tiny.yaml")
    refused(result, 7, r"runs/tiny: cannot be written|runs/tiny.*Not a directory")
