"""The DeepSpeed engine as a user has it: by torchrun, by DeepSpeed's own launcher, in the middle of a native run."""

import json
import os
import socket
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONFIG = """\
name: tiny
model:
  num_layers: 2
  d_model: 32
  num_heads: 2
  seq_len: 32
  moe: {num_experts: 5, d_ff: 32, router: {kind: bias_balanced, jitter: 0.1}, capacity: {factor: 1.5}}
data:
  sources: [{kind: text, path: text.txt, domain: prose}]
schedule: {kind: warmup_cosine, peak_lr: 1e-2, warmup_steps: 2}
train: {steps: 8, global_batch_size: 7}
eval: {every: 4, max_tokens_per_domain: 512}
parallel: {micro_batch_size: 4}
checkpoint: {every: 4, keep: 2}
metrics: {log_every: 1}
"""
CLOCK = ("step_s", "tokens_per_s", "mfu")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a config, a text, and a finished native run, `alone`."""
    folder = tmp_path_factory.mktemp("deepspeed")
    (folder / "tiny.yaml").write_text(CONFIG)
    (folder / "text.txt").write_text("It was a bright cold day in April, and the clocks were striking. " * 200)
    run(folder, [sys.executable, "-m", "trainer"], "train", "tiny.yaml", "name=alone")
    return folder


def run(folder: Path, command: list[str], *arguments: str) -> str:
    """Run a command to a good end; return what it said."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [*command, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=200
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def torchrun(num_ranks: int) -> list[str]:
    options = ["--standalone", "--nproc-per-node", str(num_ranks)]
    return [sys.executable, "-m", "torch.distributed.run", *options, "-m", "trainer"]


def numbers(folder: Path, name: str) -> list[float]:
    """Every number of metrics.jsonl that does not depend on the clock."""
    records = map(json.loads, (folder / "runs" / name / "metrics.jsonl").read_text().splitlines())
    return [v for record in records for k, v in record.items() if k not in CLOCK and v is not None]


def test_torchrun_trains_the_same_under_deepspeed(workplace: Path) -> None:
    options = ["engine.kind=deepspeed", "engine.zero_stage=2", "parallel.ep_size=2"]
    said = run(workplace, torchrun(2), "train", "tiny.yaml", "name=two", *options)
    assert numbers(workplace, "two") == pytest.approx(numbers(workplace, "alone"), rel=1e-4, abs=1e-5)
    assert "OVERFLOW" not in said and "Traceback" not in said and "DeepSpeed, ZeRO 2" in said
    assert "[INFO]" not in said, "DeepSpeed says nothing unless it is asked to"


def test_a_native_run_goes_on_under_deepspeed_in_one_process_and_is_evaluated(workplace: Path) -> None:
    alone = [sys.executable, "-m", "trainer"]
    run(workplace, torchrun(2), "train", "tiny.yaml", "name=switch", "train.steps=4", "parallel.ep_size=2")
    options = ["name=switch", "engine.kind=deepspeed", "engine.offload_optimizer=cpu"]
    said = run(workplace, alone, "train", "tiny.yaml", *options)
    assert "engine native -> deepspeed" in said
    result = subprocess.run(
        [*alone, "eval", "runs/switch", "--json"],
        cwd=workplace,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    last = json.loads((workplace / "runs/switch/metrics.jsonl").read_text().splitlines()[-1])
    assert json.loads(result.stdout)["eval/loss"] == pytest.approx(last["eval/loss"], rel=1e-6)


def test_deepspeeds_own_launcher_starts_it(workplace: Path) -> None:
    deepspeed = Path(sysconfig.get_path("scripts")) / "deepspeed"
    with_cpu = ["env", "DS_ACCELERATOR=cpu", f"PATH={deepspeed.parent}:{os.environ['PATH']}"]
    with socket.socket() as free:  # DeepSpeed's launcher does not look for one
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    options = ["--num_accelerators", "2", "--master_port", port, "--module", "trainer"]
    arguments = ["train", "tiny.yaml", "name=launcher", "engine.kind=deepspeed", "parallel.ep_size=2"]
    run(workplace, [*with_cpu, str(deepspeed), *options], *arguments)
    assert numbers(workplace, "launcher") == pytest.approx(numbers(workplace, "alone"), rel=1e-4, abs=1e-5)


LOADED = """
import sys
from trainer.cli import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    found = sorted(name for name in sys.modules if name.split(".")[0] == "deepspeed")
    sys.exit(f"loaded {found[:3]}" if found or end.code else 0)
"""


@pytest.mark.parametrize(
    "arguments", [["train", "tiny.yaml", "name=lazy", "train.steps=3"], ["config", "show", "tiny.yaml"]]
)
def test_nothing_of_deepspeed_is_loaded_for_another_engine(workplace: Path, arguments: list[str]) -> None:
    run(workplace, [sys.executable, "-c", LOADED], *arguments)


def test_a_missing_deepspeed_is_answered_in_a_line(workplace: Path, tmp_path: Path) -> None:
    (tmp_path / "deepspeed.py").write_text("raise ImportError('No module named deepspeed')\n")
    result = subprocess.run(
        [sys.executable, "-m", "trainer", "train", "tiny.yaml", "name=none", "engine.kind=deepspeed"],
        cwd=workplace,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert result.returncode == 2
    assert "engine.kind: deepspeed: No module named deepspeed; pip install deepspeed, or use native" in result.stderr


def test_a_kernel_that_cannot_be_compiled_is_answered_in_a_line(workplace: Path, tmp_path: Path) -> None:
    options = ["engine.kind=deepspeed", "engine.offload_optimizer=cpu", "engine.adam=deepspeed"]
    result = subprocess.run(
        [sys.executable, "-m", "trainer", "train", "tiny.yaml", "name=none", *options],
        cwd=workplace,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PATH": str(tmp_path), "TORCH_EXTENSIONS_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert result.returncode == 2, result.stderr
    assert "engine.adam: DeepSpeed's cpu_adam cannot be built: " in result.stderr and "; use torch" in result.stderr
    assert "Traceback" not in result.stderr
