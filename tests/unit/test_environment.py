"""Each invalid variable of a launcher is reported in one line, with exit code 2, at once."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.launched_ranks import ROOT
from trainer import cli, environment
from trainer.distributed import mpi_environment
from trainer.distributed.rank_layout import Degrees, Layout, is_first_on_node, is_first_rank, layout_from_environment
from trainer.errors import ConfigError
from trainer.status import REPORT
from trainer.supervise.launch import Launch

RANK_OF_TWO = {
    "WORLD_SIZE": "2",
    "RANK": "0",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "1",
}
ON_TWO_MACHINES = {"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
NO_NUMBER = ["abc", "-1", "1.5", "1e3", " ", "0x2", "\u00b2", "9" * 5000]
LARGE = "1048577"
BAD = [
    *[("train", "WORLD_SIZE", bad, RANK_OF_TWO) for bad in [*NO_NUMBER, "0", LARGE]],
    *[("train", "RANK", bad, RANK_OF_TWO) for bad in [*NO_NUMBER, "2", "17"]],
    *[("train", "RANK", bad, {}) for bad in ["1", "x"]],
    *[("train", "LOCAL_RANK", bad, RANK_OF_TWO) for bad in [*NO_NUMBER, "2"]],
    *[("train", "LOCAL_WORLD_SIZE", bad, RANK_OF_TWO) for bad in [*NO_NUMBER, "3"]],
    *[("train", "LOCAL_SIZE", bad, RANK_OF_TWO | {"LOCAL_WORLD_SIZE": ""}) for bad in [*NO_NUMBER, "3"]],
    *[("train", "MASTER_PORT", bad, RANK_OF_TWO) for bad in [*NO_NUMBER, "0", "99999"]],
    ("train", "MASTER_PORT", "99999", {}),
    *[("train", "GLOO_SOCKET_IFNAME", bad, RANK_OF_TWO) for bad in ["nowhere0", "lo,nowhere0"]],
    *[("train", "TURNOUT_SUPERVISOR", bad, {}) for bad in [*NO_NUMBER, "0", str(1 << 31)]],
    *[(verb, "OMP_NUM_THREADS", bad, {}) for verb in ("train", "launch") for bad in ["abc", "0", "-1", "4,", "1.5"]],
    *[(verb, "TURNOUT_FAULTS", bad, {}) for verb in ("train", "launch") for bad in ["save", "save=die", "a=kill,b"]],
    *[("launch", "NPROC", bad, {}) for bad in [*NO_NUMBER, "0", "1025"]],
    *[("launch", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", bad, {"NPROC": "2"}) for bad in NO_NUMBER],
    ("launch", "GLOO_SOCKET_IFNAME", "nowhere0", {"NPROC": "2"}),
    *[("launch", "NNODES", bad, ON_TWO_MACHINES) for bad in [*NO_NUMBER, "0"]],
    *[("launch", "NODE_RANK", bad, ON_TWO_MACHINES) for bad in [*NO_NUMBER, "2"]],
    *[("launch", "MASTER_PORT", bad, ON_TWO_MACHINES) for bad in [*NO_NUMBER, "0", "99999"]],
    *[("train", name, "4", {rank: "1"}) for name, rank in mpi_environment._MPI],
    *[("train", name, "x", {rank: "1"}) for name, rank in mpi_environment._MPI],
]
"""Verb, variable, value, and the other variables."""


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {*RANK_OF_TWO, *ON_TWO_MACHINES, "NPROC", "LOCAL_SIZE", "GLOO_SOCKET_IFNAME", "OMP_NUM_THREADS"}
    for name in names | {name for name in os.environ if name.startswith(("SLURM_", "OMPI_", "PMI_", "TURNOUT_"))}:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A valid config; no run ever reads it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.yaml").write_text("name: x\ndata: {sources: [{kind: text, path: x.txt, domain: x}]}\n")
    return "x.yaml"


def ended(verb: str, config: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    began = time.thread_time()
    with pytest.raises(SystemExit) as exit_:
        cli.main([verb, config])
    assert time.thread_time() - began < 2
    assert isinstance(exit_.value.code, int)
    return exit_.value.code, capsys.readouterr().err.splitlines()


@pytest.mark.parametrize(("verb", "name", "value", "others"), BAD, ids=[f"{v}-{n}-{x[:12]}" for v, n, x, _ in BAD])
def test_a_variable_that_cannot_be_is_named_in_one_line(
    verb: str,
    name: str,
    value: str,
    others: dict[str, str],
    config: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cli.time, "sleep", _never)
    for key, text in (others | {name: value}).items():
        monkeypatch.setenv(key, text)
    code, lines = ended(verb, config, capsys)
    assert code == 2 and len(lines) == 1, lines
    shown = value if len(value) < 100 else value[:40] + "..."
    assert lines[0].startswith("TURNOUT_FAULTS: " if name == "TURNOUT_FAULTS" else f"{name}={shown}: "), lines[0]


@pytest.mark.parametrize(("name", "value"), [("TORCH_DISTRIBUTED_DEBUG", "foo"), ("TORCH_LOGS", "bogus")])
def test_a_variable_with_which_torch_cannot_be_imported_is_named_in_one_line(name: str, value: str) -> None:
    command = [sys.executable, "-m", "trainer", "launch", "no.yaml"]
    ended = subprocess.run(command, env={**os.environ, name: value}, capture_output=True, text=True, timeout=100)
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1), ended.stderr
    assert ended.stderr.startswith(f"{name}={value}: torch cannot be imported with it: ")


def _never(seconds: float) -> None:
    raise AssertionError("nobody else says it, so nobody is waited for")


def test_what_a_rank_of_several_lacks_is_named(
    config: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert ended("train", config, capsys) == (
        2,
        ["WORLD_SIZE=4 needs RANK, MASTER_ADDR, MASTER_PORT as well; launch and torchrun set all of them"],
    )


def test_messages_say_who_sets_it() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        patch.setenv("RANK", "2")
        expected = r"^RANK=2: is not a number from 0 to 1 \(WORLD_SIZE=2\); launch and torchrun set it$"
        with pytest.raises(ConfigError, match=expected):
            environment.check_rank_variables()
        patch.delenv("WORLD_SIZE")
        with pytest.raises(ConfigError, match=r"^RANK=2: is not .* 0: WORLD_SIZE is not set, so there is one rank; "):
            environment.check_rank_variables()


def test_what_is_right_or_empty_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for threads in ("1", "16", "4,2", " 8 ", ""):
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        environment.check_process_variables()
    environment.check_rank_variables()
    assert layout_from_environment(Degrees()) == Layout() and is_first_rank() and is_first_on_node()
    for name, value in (RANK_OF_TWO | {"RANK": "1", "LOCAL_RANK": "1", "GLOO_SOCKET_IFNAME": "lo"}).items():
        monkeypatch.setenv(name, value)
    environment.check_rank_variables()
    assert layout_from_environment(Degrees(ep_size=2)) == Layout(world_size=2, rank=1, ep_size=2, ranks_per_node=2)
    assert not is_first_rank() and not is_first_on_node()
    for name in RANK_OF_TWO:
        monkeypatch.setenv(name, "")
    environment.check_rank_variables()
    assert layout_from_environment(Degrees()) == Layout() and is_first_rank() and is_first_on_node()


def test_torchruns_part_without_launch_says_so_in_a_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainer.distributed.torchrun import run

    for value, said in ((None, f"{REPORT}: is not set; use"), ("x", f"{REPORT}=x: is not")):
        if value is not None:
            monkeypatch.setenv(REPORT, value)
        with pytest.raises(SystemExit) as exit_:
            run()
        assert exit_.value.code == 2
        assert capsys.readouterr().err == f"{said} a number of at least 0; this module is started by launch\n"


SRUN = {"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_ID": "0"}
OLD_SRUN = {"SLURM_NTASKS": "4", "SLURM_STEP_ID": "0"}
LITTLE = {"SLURM_NTASKS": "4"}


@pytest.mark.parametrize("verb", ["train", "launch"])
@pytest.mark.parametrize(
    ("told", "procid"),
    [(SRUN, "0"), (SRUN, "3"), (OLD_SRUN, "0"), (OLD_SRUN, "3"), (LITTLE, "1"), (LITTLE, "3")],
    ids=str,
)
def test_tasks_of_srun_that_would_each_train_the_same_run_are_refused(
    told: dict[str, str],
    verb: str,
    procid: str,
    config: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in (told | {"SLURM_PROCID": procid}).items():
        monkeypatch.setenv(name, value)
    code, lines = ended(verb, config, capsys)
    assert code == 2 and len(lines) == 1, lines
    assert lines[0].startswith(("SLURM_STEP_NUM_TASKS=4: so many", "SLURM_NTASKS=4: so many processes were"))
    assert "torchrun" in lines[0] and "launch.sh" in lines[0] and "scripts/slurm.sh" in lines[0]


ONE_PROCESS = {
    "salloc": {"SLURM_NTASKS": "4"},
    "salloc with an interactive step": SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
    "srun --pty": {"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_ID": "3", "SLURM_PROCID": "0"},
    "srun of one task": {"SLURM_NTASKS": "1", "SLURM_STEP_ID": "3", "SLURM_PROCID": "0"},
    "sbatch": {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"},
    "sbatch for several tasks": {"SLURM_NTASKS": "4", "SLURM_PROCID": "0"},
    "mpirun of one": {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0", "PMI_SIZE": "1", "PMI_RANK": "0"},
    "a size alone": {"PMI_SIZE": "4"},
}


@pytest.mark.parametrize("told", ONE_PROCESS)
def test_one_process_in_an_allocation_of_several_tasks_may_train(told: str) -> None:
    mpi_environment.check_tasks(ONE_PROCESS[told], expected=1)
    warning = mpi_environment.task_warning(ONE_PROCESS[told])
    if told == "sbatch for several tasks":
        assert warning is not None and warning.startswith("SLURM_NTASKS=4, and this run has one process; for more, ")
    else:
        assert warning is None


def test_a_launcher_that_says_who_is_who_is_believed(
    config: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torchrun in every task, or DeepSpeed's launcher, which starts ranks by MPI."""
    for name, value in (SRUN | RANK_OF_TWO | {"SLURM_PROCID": "1", "MASTER_ADDR": "no-such-host.invalid"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("trainer.commands.train.end_with_launcher", lambda: None)
    monkeypatch.setattr("trainer.commands.train.run_to_train", _reached)
    with pytest.raises(Reached):
        cli.main(["train", config])


class Reached(Exception):
    """The config is read."""


def _reached(options: object) -> None:
    raise Reached


def test_launch_on_every_machine_is_as_many_tasks_as_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    mpi_environment.check_tasks(SRUN | {"SLURM_PROCID": "1"}, expected=4)
    assert Launch.of({}, {"NNODES": "4", "NODE_RANK": "1", "MASTER_ADDR": "a"}).nnodes == 4


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name in ("SLURM_JOB_ID", "SLURM_JOB_NUM_NODES", "SLURM_SUBMIT_DIR") for value in (None, "x")]
    + [("SLURM_JOB_NODELIST", None)],
)
def test_the_slurm_script_names_what_it_cannot_use(name: str, value: str | None) -> None:
    right = {
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": "17",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "n[1-2]",
    }
    told = {key: text for key, text in (right | {name: value}).items() if text is not None}
    done = subprocess.run([ROOT / "scripts/slurm.sh"], env=told, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("slurm.sh: ") and name in done.stderr
