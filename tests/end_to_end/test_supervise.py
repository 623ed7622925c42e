"""Use `launch` as a user or a scheduler does: it restarts after transient failures and not after permanent ones.

What is started with `imports` is python as a user starts it; elsewhere all processes are forks, in a tenth of the time.

To repeat with random kills: `pytest tests/end_to_end/test_supervise.py -k restart --times 50`.
"""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch.distributed.launcher.api import LaunchConfig

from tests import imported_once
from tests.end_to_end.tiny import run_ranks
from tests.held_steps import HeldSteps
from tests.launched_ranks import ROOT
from tests.listening_sockets import beyond_this_machine, listeners
from trainer import cli
from trainer.checkpoint.run_folder import RunFolder
from trainer.status import Status, read_statuses
from trainer.supervise import supervisor
from trainer.supervise.launch import Launch
from trainer.supervise.policy import Policy
from trainer.supervise.supervisor import Supervisor

CONFIG = """\
name: tiny
model:
  num_layers: 1
  d_model: 16
  num_heads: 2
  seq_len: 32
  moe: {num_experts: 4, d_ff: 16, router: {kind: bias_balanced, jitter: 0.1}}
data:
  sources: [{kind: text, path: text.txt, domain: prose}]
train: {steps: 90, global_batch_size: 4}
eval: {every: 40, max_tokens_per_domain: 256}
checkpoint: {every: 10, keep: 2}
parallel: {micro_batch_size: 4}
metrics: {log_every: 1}
"""


class Started(NamedTuple):
    """A process, and the file with its stderr."""

    process: imported_once.Process | subprocess.Popen[bytes]
    errors: Path

    @property
    def pid(self) -> int:
        return self.process.pid


Start = Callable[..., Started]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with a config, a text and an uninterrupted run of two ranks, `whole`."""
    folder = tmp_path_factory.mktemp("supervise")
    (folder / "tiny.yaml").write_text(CONFIG)
    (folder / "text.txt").write_text("It was a bright cold day in April, and the clocks were striking. " * 200)
    run_ranks(folder, 2, "train", "tiny.yaml", "name=whole")
    return folder


@pytest.fixture
def start(workplace: Path) -> Iterator[Start]:
    """Return a function that starts python in the folder; kill remaining processes after the test."""
    started = list[Started]()

    def run(*arguments: str, imports: bool = False, held: HeldSteps | None = None, **environment: str) -> Started:
        """Start `python -m ARGUMENTS`; it and its children import everything themselves only if `imports`."""
        errors = workplace / f"stderr.{len(started)}"
        command = [*arguments] if arguments[0].endswith(".py") else ["-m", *arguments]
        environment |= {} if held is None else held.environment()
        if imports:
            path = str(ROOT) if held is None else f"{held.customize()}:{ROOT}"
            variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **environment}
            with errors.open("wb") as file:
                process = subprocess.Popen(
                    [sys.executable, *command], cwd=workplace, env=variables, stdout=subprocess.DEVNULL, stderr=file
                )
            started.append(Started(process, errors))
        else:
            process = imported_once.Process(command, cwd=workplace, stderr=errors, environment=environment)
            started.append(Started(process, errors))
        return started[-1]

    yield run
    for one in started:
        one.process.kill()
        one.process.wait(10)


def launch(name: str, nproc: int, *overrides: str) -> list[str]:
    return ["trainer", "launch", "tiny.yaml", "--nproc", str(nproc), f"name={name}", *overrides]


def ended(started: Started) -> tuple[int, str]:
    """Wait for the end; return the exit code and stderr."""
    code = started.process.wait(100)
    return code, started.errors.read_text()


def wait_for(workplace: Path, name: str, ranks: int, *, step: int, not_of: str = "") -> dict[int, Status]:
    """Wait until the ranks of one attempt have reached a step; return their statuses.

    Args:
        workplace: folder of the runs.
        name: name of the run.
        ranks: number of ranks.
        step: from 1; 0 is start-up.
        not_of: an earlier attempt to ignore.
    """
    folder, end = workplace / "runs" / name / "status", time.monotonic() + 100
    while time.monotonic() < end:
        found = [json.loads(path.read_text()) for path in sorted(folder.glob("rank*.json"))]
        attempt = found[0]["attempt"] if found else not_of
        statuses = read_statuses(folder, attempt)
        if attempt != not_of and len(statuses) == ranks and all(s.step >= step for s in statuses.values()):
            return statuses
        time.sleep(0.02)
    raise AssertionError(f"{name} has not reached step {step}")


def wait_for_lines(path: Path, count: int) -> None:
    end = time.monotonic() + 100
    while not path.is_file() or len(path.read_text().splitlines()) < count:
        assert time.monotonic() < end, path
        time.sleep(0.02)


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def of_attempt(attempt: str) -> list[str]:
    """Return the command lines of the processes of an attempt."""
    found = []
    for folder in Path("/proc").glob("[1-9]*"):
        try:
            if f"TURNOUT_ATTEMPT={attempt}".encode() in (folder / "environ").read_bytes():
                found.append((folder / "cmdline").read_text())
        except OSError:
            continue
    return found


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def losses(workplace: Path, name: str) -> list[tuple[int, str]]:
    """Return step and loss, with all digits, of every line of metrics.jsonl."""
    lines = map(json.loads, (workplace / "runs" / name / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], repr(line.get("loss", line.get("eval/loss")))) for line in lines]


def newest(workplace: Path, name: str) -> int | None:
    return supervisor.newest_checkpoint(RunFolder(workplace / "runs" / name))


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (["train.step=3", "--nproc", "2"], ["train.step: unknown key"]),
        (["model.d_model=-1", "train.steps=0"], ["model.d_model: must be more than 0", "train.steps: must be"]),
        (["parallel.ep_size=3", "--nproc", "2", "--nnodes", "1"], ["parallel.ep_size: 3 does not divide the 2 ranks"]),
        (["--nproc", "many"], ["--nproc many: is not a number of at least 1"]),
        (["--nnodes", "2"], ["NODE_RANK: is not set; use a number from 0 to 1", "NNODES=2 needs MASTER_ADDR as well"]),
        (["name=whole", "model.d_model=32"], ["runs/whole: was written with model.d_model 16, the config has 32"]),
    ],
)
def test_a_config_error_is_one_line_and_starts_nothing(
    workplace: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    messages: list[str],
) -> None:
    def spawn(*_: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.chdir(workplace)
    monkeypatch.setattr(supervisor, "Child", spawn)
    with pytest.raises(SystemExit) as exit_:
        cli.main(["launch", "tiny.yaml", *arguments])
    assert exit_.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(messages), lines
    for line, message in zip(lines, messages, strict=True):
        assert message in line


@pytest.fixture
def taken_port() -> Iterator[int]:
    """Return a port on which another process listens."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        yield other.getsockname()[1]


def test_a_port_that_is_taken_is_a_config_error(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], taken_port: int
) -> None:
    monkeypatch.chdir(workplace)
    where = ["--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", str(taken_port)]
    monkeypatch.setattr(Supervisor, "run", lambda _: 99)
    for node_rank, code, said in (
        ("0", 2, f"MASTER_PORT={taken_port}: cannot be used on this node (127.0.0.1): Address already in use; use"),
        ("1", 99, ""),
    ):
        with pytest.raises(SystemExit) as exit_:
            cli.main(["launch", "tiny.yaml", "name=port", *where, "--node-rank", node_rank])
        assert exit_.value.code == code
        assert capsys.readouterr().err.startswith(said)


def test_torchrun_that_cannot_meet_says_so_in_a_line(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], taken_port: int
) -> None:
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    ranks = Launch(nnodes=2, master_addr="127.0.0.1", master_port=taken_port)
    folder, policy = RunFolder(Path("runs/port")), Policy(max_restarts=0)
    assert Supervisor(ranks, ["train", "tiny.yaml"], folder, patience_s=30, policy=policy).run() == 5
    said = capfd.readouterr().err
    assert said.count(f"ended with 5 (cannot connect to the other nodes through 127.0.0.1:{taken_port}: ") == 1, said
    assert "Traceback" not in said and len(said.splitlines()) <= 4, said


OTHER_LAUNCHER = {
    "WORLD_SIZE": "2",
    "RANK": "1",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
}
"""Set in an interactive Slurm step or under mpirun; `launch` does not hear them."""


def test_a_config_error_waits_for_no_rank_of_another_launcher(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workplace)
    for name, value in OTHER_LAUNCHER.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cli, "_wait_for_report", lambda _: pytest.fail("it waits for rank 0"))
    with pytest.raises(SystemExit) as exit_:
        cli.main(launch("other", 1, "train.step=2")[1:])
    assert exit_.value.code == 2
    assert "rank 1: " not in capsys.readouterr().err


def test_a_data_error_of_two_ranks_is_exit_3_and_not_retried(start: Start) -> None:
    code, said = ended(start(*launch("nodata", 2, "data.sources.0.path=nowhere.txt")))
    assert code == 3, said
    assert "nowhere.txt" in said and len(said.splitlines()) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_config_error_that_the_ranks_find_is_exit_2_and_not_retried(start: Start) -> None:
    """Rank 0 reports it; rank 1 waits, and torchrun ends it by SIGTERM."""
    code, said = ended(start(*launch("nogpu", 2, "parallel.device=cuda")))
    assert code == 2, said
    assert "parallel.device" in said and len(said.splitlines()) == 1


def test_restarts_after_a_killed_rank_and_a_killed_torchrun_repeat_the_run_bit_for_bit(
    workplace: Path, start: Start, times: int
) -> None:
    for number in range(times):
        draw = random.Random(number)
        name, victim = f"killed{number}", draw.randrange(2)
        held = HeldSteps(workplace / f"{name}.held", (41, 61))
        process = start(*launch(name, 2), imports=True, held=held)
        first = wait_for(workplace, name, 2, step=draw.randint(1, 40))
        began = time.monotonic()
        os.kill(first[victim].pid, signal.SIGKILL)
        held.release(41)
        second = wait_for(workplace, name, 2, step=draw.randint(41, 60), not_of=first[0].attempt)
        print(
            f"seed {number}: rank {victim} killed at step {first[victim].step}: "
            f"at step {second[0].step} {time.monotonic() - began:.1f} s later"
        )
        os.kill(parent(second[0].pid), signal.SIGKILL)
        held.release(61)
        wait_for(workplace, name, 2, step=1, not_of=second[0].attempt)
        assert of_attempt(first[0].attempt) == of_attempt(second[0].attempt) == []
        code, said = ended(process)
        assert code == 0, said
        assert f"rank {victim} (pid {first[victim].pid}) was killed by SIGKILL at step " in said
        assert "torchrun (pid " in said and ") was killed by SIGKILL at about step " in said
        assert said.count("in 1 s (restart 1, 2 more without progress)") >= 1
        assert losses(workplace, name) == losses(workplace, "whole")


def test_a_frozen_process_that_is_the_only_rank_is_named_and_the_run_goes_on(workplace: Path, start: Start) -> None:
    held = HeldSteps(workplace / "frozen.held", (20,))
    process = start(*launch("frozen", 1, "parallel.timeout_s=6", "train.steps=25"), held=held)
    status = wait_for(workplace, "frozen", 1, step=1)[0]
    wait_for_lines(workplace / "runs/frozen/metrics.jsonl", 19)
    os.kill(status.pid, signal.SIGSTOP)
    held.release()
    began = time.monotonic()
    wait_for(workplace, "frozen", 1, step=1, not_of=status.attempt)
    assert time.monotonic() - began > 6, "it is given its time"
    code, said = ended(process)
    assert code == 0, said
    assert (
        f"rank 0 (pid {status.pid}) sent no liveness message for 6 s (frozen or stuck), killed at about step " in said
    )
    assert " starting again from step 10 in 1 s " in said, said


@pytest.mark.one_in(2)
@pytest.mark.parametrize("nproc", [1, 2])
def test_a_killed_supervisor_leaves_nobody_behind(workplace: Path, start: Start, nproc: int) -> None:
    process = start(*launch(f"orphans{nproc}", nproc, "train.steps=1000000"), imports=True)
    statuses = wait_for(workplace, f"orphans{nproc}", nproc, step=1)
    attempt = statuses[0].attempt
    assert len(of_attempt(attempt)) == (1 if nproc == 1 else 3)
    pids = [process.pid, *(status.pid for status in statuses.values()), parent(statuses[0].pid)]
    assert len(listeners(pids)) == 0 if nproc == 1 else len(listeners(pids)) >= 3
    assert beyond_this_machine(pids) == set(), "nobody can reach a run of one machine"
    process.process.kill()
    end = time.monotonic() + 5
    while left := of_attempt(attempt):
        assert time.monotonic() < end, left
        time.sleep(0.05)


@pytest.mark.nightly
def test_a_crash_loop_ends_after_as_many_restarts_as_it_may_have_and_names_the_rows(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("TURNOUT_FAULTS", "phase.data#2=raise")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    arguments = ["train", "tiny.yaml", "name=loop", "checkpoint.every=2"]
    folder, policy = RunFolder(Path("runs/loop")), Policy(first_pause_s=0.01, max_restarts=1)
    assert Supervisor(Launch(), arguments, folder, patience_s=30, policy=policy).run() == 1
    *lines, last = [line for line in capfd.readouterr().err.splitlines() if line.startswith(("rank 0", "every"))]
    error = "(RuntimeError: planted fault at phase.data)"
    assert [line.split(") ", 1)[1] for line in lines] == [
        f"ended with 1 {error} at step 2; starting again from step 0 in 0.01 s (restart 1, 0 more without progress)",
        f"ended with 1 {error} at step 2; giving up with exit code 1: 1 restarts made no progress",
    ]
    assert last == "every attempt ended in step 2 with rows 4 to 7; there is no checkpoint yet"


def test_a_stop_of_the_supervisor_torchrun_one_rank_or_all_loses_no_step(workplace: Path, start: Start) -> None:
    step, held = 0, HeldSteps(workplace / "stopped.held", (20, 40, 60, 80))
    for who, number, last in (
        ("supervisor", signal.SIGUSR1, 20),
        ("torchrun", signal.SIGTERM, 40),
        ("rank", signal.SIGHUP, 60),
        ("everyone", signal.SIGUSR1, 80),  # as Slurm's --signal=USR1 does it
    ):
        process = start(*launch("stopped", 2, "checkpoint.every=null"), held=held)
        statuses = wait_for(workplace, "stopped", 2, step=step + 1)
        pids = {"supervisor": process.pid, "torchrun": parent(statuses[0].pid), "rank": statuses[1].pid}
        for pid in [pids[who]] if who in pids else [*pids.values(), statuses[0].pid]:
            os.kill(pid, number)
        held.release(last)
        code, said = ended(process)
        assert (code, said) == (75, ""), who
        saved = newest(workplace, "stopped")
        assert saved is not None and saved == losses(workplace, "stopped")[-1][0]
        step = saved
    done = losses(workplace, "stopped")
    assert done == losses(workplace, "whole")[: len(done)]


PATIENT = """
import sys
from functools import partial
from trainer.cli import main
from trainer.supervise import supervisor
supervisor.Policy = partial(supervisor.Policy, first_pause_s=50.0)
main(sys.argv[1:])
"""


def test_a_stop_while_the_supervisor_waits_is_75_where_there_is_a_checkpoint(workplace: Path, start: Start) -> None:
    environment = {**OTHER_LAUNCHER, "TURNOUT_FAULTS": "phase.data#2=raise"}
    (workplace / "patient.py").write_text(PATIENT)
    started = start("patient.py", *launch("paused", 1, "checkpoint.every=1")[1:], **environment)
    while "starting again from step 1 in 50 s" not in started.errors.read_text():
        assert started.process.poll() is None
        time.sleep(0.02)
    started.process.send_signal(signal.SIGTERM)
    code, said = ended(started)
    assert code == 75, said
    assert "stopped by SIGTERM before" in said and newest(workplace, "paused") == 1


@pytest.mark.parametrize(("who", "number"), [("supervisor", signal.SIGINT), ("rank", signal.SIGTERM)])
def test_a_stop_before_the_first_step_is_75_and_saves_nothing(
    workplace: Path, start: Start, who: str, number: signal.Signals
) -> None:
    """Rank 1 sleeps at the end of its start-up; rank 0 waits for it in the first collective of the first step."""
    process = start(*launch(f"early{who}", 2), TURNOUT_FAULTS="phase.opening_the_trackers:1=sleep")
    statuses = wait_for(workplace, f"early{who}", 2, step=0)
    while not (workplace / f"runs/early{who}/environment.json").is_file():
        time.sleep(0.02)
    time.sleep(0.5)
    os.kill(process.pid if who == "supervisor" else statuses[1].pid, number)
    code, said = ended(process)
    assert code == 75, said
    assert f"stopped by {number.name} before its first step: nothing is lost; start it again to continue" in said
    assert "starting again" not in said and newest(workplace, f"early{who}") is None


@pytest.mark.nightly
def test_plain_torchrun_restarts_and_saves_when_it_is_stopped(workplace: Path, start: Start) -> None:
    """Uses the options of docs/reliability.md; every process gets SIGUSR1, as from Slurm."""
    text = (ROOT / "docs/reliability.md").read_text()
    (documented,) = re.findall(r"^torchrun (--signals-to-handle .*) --nproc-per-node", text, re.MULTILINE)
    options = documented.split()
    if not hasattr(LaunchConfig, "shutdown_timeout"):  # torch 2.11
        del options[options.index("--shutdown-timeout") :][:2]
    options[options.index("--master-port") + 1] = free_port()
    torchrun = ["torch.distributed.run", *options, "--nproc-per-node", "2", "--max-restarts", "3"]
    held = HeldSteps(workplace / "plain.held", (30, 60))
    process = start(*torchrun, "-m", "trainer", "train", "tiny.yaml", "name=plain", "checkpoint.every=10", held=held)
    pid = wait_for_pid(workplace, other_than=0, step=15)
    os.kill(pid, signal.SIGKILL)
    held.release(30)
    pid = wait_for_pid(workplace, other_than=pid, step=15)
    for one in (read_statuses(workplace / "runs/plain/status", "")[0].pid, pid, process.pid):
        os.kill(one, signal.SIGUSR1)
    held.release(60)
    code, said = ended(process)
    assert code == 1, "torchrun's own"
    done = losses(workplace, "plain")
    assert newest(workplace, "plain") == done[-1][0], said
    assert done == losses(workplace, "whole")[: len(done)]


def wait_for_pid(workplace: Path, *, other_than: int, step: int) -> int:
    """Wait until a new rank 1 of a run without supervisor has reached a step; return its pid."""
    end = time.monotonic() + 100
    while time.monotonic() < end:
        status = read_statuses(workplace / "runs/plain/status", "").get(1)
        if status is not None and status.pid != other_than and status.step >= step:
            return status.pid
        time.sleep(0.02)
    raise AssertionError(f"rank 1 has not reached step {step}")


@pytest.mark.nightly
def test_two_nodes_start_their_ranks_again_and_meet(workplace: Path, start: Start) -> None:
    """Both nodes are this machine, with one rank each."""
    where = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    held = HeldSteps(workplace / "nodes.held", (30,))
    nodes = [start(*launch("nodes", 1), held=held, **where, NODE_RANK=str(node)) for node in range(2)]
    folder, end = workplace / "runs/nodes/status/rank00001.json", time.monotonic() + 100
    while not (folder.is_file() and json.loads(folder.read_text())["step"] >= 15):
        assert time.monotonic() < end
        time.sleep(0.02)
    os.kill(json.loads(folder.read_text())["pid"], signal.SIGKILL)
    held.release()
    codes, said = zip(*map(ended, nodes), strict=True)
    assert codes == (0, 0), said
    assert "rank 0 " in said[0] and "ended with 5 (rank 1 is lost" in said[0]
    assert "rank 1 " in said[1] and "was killed by SIGKILL at about step" in said[1]
    assert losses(workplace, "nodes") == losses(workplace, "whole")
