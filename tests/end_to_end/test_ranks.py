"""torchrun as a user runs it: one run on one process and on two, a run that moves between them, errors said once."""

import json
import os
import shutil
import socket
import subprocess
import sys
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
train: {steps: 8, global_batch_size: 7, dtype: float64}
eval: {every: 4, max_tokens_per_domain: 512}
parallel: {micro_batch_size: 4}
checkpoint: {every: 4, keep: 2}
metrics: {log_every: 1}
"""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a config, a text, and two finished runs: `alone`, and `together` on two ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "tiny.yaml").write_text(CONFIG)
    (folder / "text.txt").write_text("It was a bright cold day in April, and the clocks were striking. " * 200)
    for result in (
        run(folder, 1, "train", "tiny.yaml", "name=alone"),
        run(folder, 2, "train", "tiny.yaml", "name=together", "parallel.ep_size=2"),
    ):
        assert result.returncode == 0, result.stderr
    return folder


def run(folder: Path, nproc: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a verb, under torchrun if there is more than one rank."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(nproc)] if nproc > 1 else []
    return subprocess.run(
        [sys.executable, *torchrun, "-m", "trainer", *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
    )


def numbers(folder: Path, name: str) -> list[tuple[str, float]]:
    """Every number of metrics.jsonl that does not depend on the clock, with its name."""
    records = map(json.loads, (folder / "runs" / name / "metrics.jsonl").read_text().splitlines())
    clock = ("step_s", "tokens_per_s", "mfu")
    return [(k, v) for record in records for k, v in record.items() if k not in clock and v is not None]


def assert_same(folder: Path, name: str) -> None:
    mine, oracle = numbers(folder, name), numbers(folder, "alone")
    assert [key for key, _ in mine] == [key for key, _ in oracle]
    assert [value for _, value in mine] == pytest.approx([value for _, value in oracle], rel=1e-9, abs=1e-9)


def test_two_ranks_log_and_evaluate_what_one_process_does(workplace: Path) -> None:
    assert_same(workplace, "together")
    assert len(numbers(workplace, "alone")) > 8 * 10


def test_a_run_of_two_ranks_goes_on_in_one_process_and_back(workplace: Path) -> None:
    for name, nproc, source, overrides in (
        ("to_one", 1, "together", ["parallel.ep_size=1"]),
        ("to_two", 2, "alone", ["parallel.ep_size=2"]),
    ):
        folder = workplace / "runs" / name
        shutil.copytree(workplace / "runs" / source, folder)
        shutil.rmtree(folder / "checkpoints/step_00000008")
        result = run(workplace, nproc, "train", "tiny.yaml", f"name={name}", *overrides)
        assert result.returncode == 0, result.stderr
        assert "resuming from" in result.stdout
        assert [path.name for path in sorted((folder / "status").iterdir())] == [
            f"rank{rank:05d}.json" for rank in range(nproc)
        ]
        assert_same(workplace, name)


def test_a_run_of_two_ranks_is_evaluated_by_one_process(workplace: Path) -> None:
    result = run(workplace, 1, "eval", "runs/together", "--json")
    assert result.returncode == 0, result.stderr
    last = [value for key, value in numbers(workplace, "alone") if key == "eval/loss"][-1]
    assert json.loads(result.stdout)["eval/loss"] == pytest.approx(last, rel=1e-9)


def test_what_is_wrong_is_said_by_one_rank(workplace: Path) -> None:
    for override, message in (
        ("parallel.ep_size=3", "ep_size: 3 does not divide the 2 ranks that were started; use one of 1, 2"),
        ("data.sources.0.path=nowhere.txt", "rank 0: "),
    ):
        result = run(workplace, 2, "train", "tiny.yaml", "name=wrong", override)
        assert result.returncode == 1, "torchrun's own code"
        assert result.stderr.count(message) == 1


def test_two_hosts_of_two_ranks_learn_what_one_process_does(workplace: Path) -> None:
    """Each with its own address, found by torchrun's rendezvous; one copy of the experts over both of them."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "2"]
    rendezvous = '--node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port 29531'
    train = "-m trainer train tiny.yaml name=hosts parallel.ep_size=4 'parallel.dispatcher={kind: hierarchical}'"
    result = subprocess.run(
        [ROOT / "tests/two_hosts.sh", "bash", "-c", f'exec "$@" {rendezvous} {train}', "bash", *torchrun],
        cwd=workplace,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    if result.returncode == 77:
        pytest.skip(f"network namespaces are not permitted here: {result.stderr.strip()}")
    assert result.returncode == 0, result.stderr
    assert_same(workplace, "hosts")
    crossed = int(result.stdout.rsplit("crossed ", 1)[1].split()[0])
    assert crossed > 1_000_000, "the ranks of the two hosts have talked over the cable"


def test_the_slurm_script_starts_the_ranks_of_every_node(workplace: Path, tmp_path: Path) -> None:
    """With a Slurm that is two scripts: both nodes are this machine, so one rank each."""
    tools = {
        "scontrol": 'echo 127.0.0.1; echo "not asked for"',
        "srun": '[ "$1 $2" = "--kill-on-bad-exit=0 --wait=60" ] || exit 9\n'
        'while [[ "$1" == --* ]]; do shift; done\n'
        'SLURM_NODEID=0 "$@" & first=$!\nSLURM_NODEID=1 "$@" & second=$!\nwait $first && wait $second',
    }
    for name, text in tools.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    slurm = {
        "MASTER_PORT": port,
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "n[1-2]",
    }
    overrides = [
        f"data.sources.0.path={workplace}/text.txt",
        f"data.cache_dir={workplace}/cache",
        f"runs_dir={workplace}/runs",
        "name=slurm",
        "parallel.ep_size=2",
    ]
    result = subprocess.run(
        [ROOT / "scripts/slurm.sh", workplace / "tiny.yaml", *overrides],
        env={
            **os.environ,
            **slurm,
            "SLURM_JOB_ID": str(os.getpid()),
            "OMP_NUM_THREADS": "1",
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
        },
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert result.returncode == 0, result.stderr
    assert_same(workplace, "slurm")
