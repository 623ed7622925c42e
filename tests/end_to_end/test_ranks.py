"""Use torchrun as a user does: one process and two, a run that moves between them, errors reported once."""

import json
import os
import shutil
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from tests.end_to_end import tiny
from tests.end_to_end.tiny import environment, make_workplace, numbers, run, run_ranks, torchrun
from tests.launched_ranks import ROOT

assert_same = partial(tiny.assert_same, rel=1e-9, abs=1e-9)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with a config, a text and two finished runs: `alone`, and `together` on two ranks."""
    folder = make_workplace(tmp_path_factory.mktemp("ranks"), dtype="float64")
    run(folder, "train", "tiny.yaml", "name=alone")
    result = torchrun(folder, 2, "train", "tiny.yaml", "name=together", "parallel.ep_size=2", imports=True)
    assert result.returncode == 0, result.stderr
    return folder


def test_two_ranks_log_and_evaluate_what_one_process_does(workplace: Path) -> None:
    assert_same(workplace, "together")
    assert len(numbers(workplace, "alone")) > 8 * 10


def test_a_run_of_two_ranks_goes_on_in_one_process_and_back(workplace: Path) -> None:
    for name, num_ranks, source in (("to_one", 1, "together"), ("to_two", 2, "alone")):
        folder = workplace / "runs" / name
        shutil.copytree(workplace / "runs" / source, folder)
        shutil.rmtree(folder / "checkpoints/step_00000008")
        arguments = ["train", "tiny.yaml", f"name={name}", f"parallel.ep_size={num_ranks}"]
        said = run(workplace, *arguments) if num_ranks == 1 else run_ranks(workplace, num_ranks, *arguments)
        assert "resuming from" in said and said.count("report.html") == 1
        assert [path.name for path in sorted((folder / "status").iterdir())] == [
            f"rank{rank:05d}.json" for rank in range(num_ranks)
        ]
        assert_same(workplace, name)


def test_a_branch_goes_on_as_its_parent_did(workplace: Path) -> None:
    said = run_ranks(workplace, 2, "train", "runs/together", "--branch", "forked", "--step", "4")
    assert "branched off from" in said and "made from  together at step 4 (branch)" in said
    assert_same(workplace, "forked")
    run(workplace, "launch", "runs/alone", "--branch", "launched", "--step", "4", "parallel.ep_size=1")
    assert_same(workplace, "launched")


def test_a_run_of_two_ranks_is_evaluated_by_one_process(workplace: Path) -> None:
    record = json.loads(run(workplace, "eval", "runs/together", "--json"))
    last = [value for key, value in numbers(workplace, "alone") if key == "eval/loss"][-1]
    assert record["eval/loss"] == pytest.approx(last, rel=1e-9)


def test_what_is_wrong_is_said_by_one_rank(workplace: Path) -> None:
    for override, message in (
        ("parallel.ep_size=3", "ep_size: 3 does not divide the 2 ranks that were started; use one of 1, 2"),
        ("data.sources.0.path=nowhere.txt", "rank 0: "),
    ):
        result = torchrun(workplace, 2, "train", "tiny.yaml", "name=wrong", override)
        assert result.returncode == 1, "torchrun's own code"
        assert result.stderr.count(message) == 1


@pytest.mark.nightly
def test_two_hosts_of_two_ranks_learn_what_one_process_does(workplace: Path) -> None:
    """Each host has its own address; torchrun's rendezvous connects them, and the experts are sharded over both."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "2"]
    rendezvous = '--node-rank "$NODE_RANK" --master-addr "$MASTER_ADDR" --master-port 29531'
    train = "-m trainer train tiny.yaml name=hosts parallel.ep_size=4 'parallel.dispatcher={kind: hierarchical}'"
    result = subprocess.run(
        [ROOT / "tests/two_hosts.sh", "bash", "-c", f'exec "$@" {rendezvous} {train}', "bash", *command],
        cwd=workplace,
        env=environment(),
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


@pytest.mark.nightly
def test_the_slurm_script_starts_the_ranks_of_every_node(workplace: Path, tmp_path: Path) -> None:
    """Slurm is faked by two scripts: both nodes are this machine, with one rank each."""
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
