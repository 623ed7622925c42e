"""A rank is killed, frozen, stuck or inconsistent: the others name it, once, and end in time.

The issue's figure, ten of ten each: `pytest tests/end_to_end/test_lost_ranks.py --times 10`.
"""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest

from tests import imported_once
from tests.launched_ranks import Started, launched, store_apart
from trainer.distributed.interface import LOOPBACK

CONFIG = """\
name: lost
model:
  num_layers: 2
  d_model: 32
  num_heads: 2
  seq_len: 32
  moe: {num_experts: 5, d_ff: 32, router: {kind: bias_balanced}}
data:
  sources: [{kind: text, path: text.txt, domain: prose}]
train: {steps: 1000000, global_batch_size: 7}
eval: {every: 50, max_tokens_per_domain: 256}
checkpoint: {every: 70, keep: 2}
parallel: {micro_batch_size: 4}
metrics: {log_every: 1}
"""
TIMEOUT_S, LIMIT_S = 4.0, 20.0
"""`parallel.timeout_s`, and the limit for the survivors, in seconds, on a busy machine; an idle one takes 2 to 8 s."""


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    (tmp_path / "text.txt").write_text("It was a bright cold day in April, and the clocks were striking. " * 200)
    return tmp_path


def wait_for_step(folder: Path, ranks: Started, step: int) -> None:
    metrics = folder / "runs/lost/metrics.jsonl"
    end = time.monotonic() + 100
    while not metrics.is_file() or len(metrics.read_text().splitlines()) < step:
        assert time.monotonic() < end and ranks.codes(range(len(ranks.processes))) == [None] * 3, ranks.said()
        time.sleep(0.05)


@pytest.mark.one_in(2)
@pytest.mark.parametrize(
    ("engine", "how", "victim"),
    [
        ("native", signal.SIGKILL, 0),
        ("native", signal.SIGKILL, 2),
        ("native", signal.SIGSTOP, 0),
        ("native", signal.SIGSTOP, 2),
        ("deepspeed", signal.SIGKILL, 0),
        ("deepspeed", signal.SIGSTOP, 2),
    ],
)
def test_a_killed_or_frozen_rank_is_named_by_one_survivor_within_bounds(
    workplace: Path, engine: str, how: signal.Signals, victim: int, times: int
) -> None:
    survivors = [rank for rank in range(3) if rank != victim]
    ep_size = f"parallel.ep_size={3 if victim else 1}"
    options = [ep_size, f"parallel.timeout_s={TIMEOUT_S}", f"engine.kind={engine}"]
    arguments = ["-m", "trainer", "train", "tiny.yaml", *options]
    for seed in range(times):
        draw = random.Random(seed)
        (workplace / "runs/lost/metrics.jsonl").unlink(missing_ok=True)
        with launched(3, arguments, workplace) as ranks:
            wait_for_step(workplace, ranks, 3)
            time.sleep(draw.random())  # anywhere in a step, an evaluation or a save
            ranks.processes[victim].send_signal(how)
            took = ranks.wait_for(survivors, seconds=LIMIT_S)
            said = ranks.said()
        print(f"seed {seed}: {how.name} rank {victim}: survivors ended after {took:.1f} s\n{said}")
        assert ranks.codes(survivors) == [5, 5]
        assert said.count("no heartbeat for") == 1
        first, *lines = said[said.index(f"rank {victim} is lost at step ") :].splitlines()
        assert " in " in first
        assert len(lines) >= 3
        for rank, line in enumerate(lines[:3]):
            assert line.startswith(f"  rank {rank} ")
            assert "last collectives: #" in line


STUCK = """
import sys, time, torch
from trainer.cli import main
import trainer.training.loop
from trainer.engine.native import NativeEngine
from trainer.errors import DataError
whole = NativeEngine.train_step
def train_step(engine, batches, **options):
    if engine.mesh.layout.rank == 1 and engine.optimizer_steps == 2:
        FAULT
    return whole(engine, batches, **options)
NativeEngine.train_step = train_step
main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("fault", "code", "text"),
    [
        ("time.sleep(1000)", 5, "rank 1 is alive, but never came to collective #"),
        ("raise DataError('shard 7 is damaged')", 3, "rank 1: shard 7 is damaged"),
        ("raise ValueError('a bug')", 1, "ValueError: a bug"),
        ("sys.exit(0)", 1, "rank 1: SystemExit: 0"),
        ("engine.mesh.world.all_gather(torch.zeros(2))", 5, "in another collective than the others"),
    ],
)
def test_a_rank_that_is_stuck_or_fails_alone_is_named_once(workplace: Path, fault: str, code: int, text: str) -> None:
    (workplace / "stuck.py").write_text(STUCK.replace("FAULT", fault))
    timeout_s = TIMEOUT_S if code == 5 else 60  # an error needs none, and its rank reports it first
    arguments = ["stuck.py", "train", "tiny.yaml", "parallel.ep_size=3", f"parallel.timeout_s={timeout_s}"]
    with launched(3, arguments, workplace) as ranks:
        ranks.wait_for([0, 2], seconds=100)
        said = ranks.said()
        assert ranks.codes([0, 2]) == [code, code], said
        assert said.count(text) == 1, said


def test_an_error_of_all_ranks_is_said_once(workplace: Path) -> None:
    fault = STUCK.replace("engine.mesh.layout.rank == 1 and ", "").replace("FAULT", "raise DataError('shard 7')")
    (workplace / "stuck.py").write_text(fault)
    with launched(3, ["stuck.py", "train", "tiny.yaml", "parallel.ep_size=3"], workplace) as ranks:
        ranks.wait_for([0, 1, 2], seconds=100)
        assert ranks.codes([0, 1, 2]) == [3, 3, 3] and ranks.said() == "shard 7\n"


MEETING = """
import signal, sys, os, time, torch
from trainer.distributed.rank_layout import Degrees, layout_from_environment
from trainer.distributed.mesh import joined
from trainer.distributed.collective_errors import raise_together
from trainer.errors import TurnoutError
layout = layout_from_environment(Degrees())
try:
    with joined(layout, torch.device("cpu"), timeout_s=3) as mesh:
        with raise_together(mesh.world):
            if layout.rank == 0:
                FAULT
        mesh.world.all_reduce_(torch.ones(1))
except TurnoutError as error:
    print(error, file=sys.stderr, flush=True)
    os._exit(error.exit_code)
"""


def test_one_rank_may_work_longer_than_an_exchange_may_take(tmp_path: Path) -> None:
    (tmp_path / "meeting.py").write_text(MEETING.replace("FAULT", "time.sleep(9)"))
    with launched(3, ["meeting.py"], tmp_path) as ranks:
        took = ranks.wait_for([0, 1, 2], seconds=100)
        assert ranks.codes([0, 1, 2]) == [0, 0, 0], ranks.said()
        assert took >= 9


def test_the_first_host_freezes_and_the_others_name_it_and_end(workplace: Path) -> None:
    """The store dies with it, and torch's client would wait for ever."""
    arguments = ["-m", "trainer", "train", "tiny.yaml", f"parallel.timeout_s={TIMEOUT_S}"]
    with launched(3, arguments, workplace, ranks_per_node=1) as ranks:
        wait_for_step(workplace, ranks, 3)
        assert ranks.store.pid is not None
        os.kill(ranks.store.pid, signal.SIGSTOP)
        ranks.processes[0].send_signal(signal.SIGSTOP)
        took = ranks.wait_for([1, 2], seconds=LIMIT_S)
        assert ranks.codes([1, 2]) == [5, 5]
        assert took >= TIMEOUT_S - 1, "nobody is given up early"
        for path in ranks.errors[1:]:
            first, second = path.read_text().splitlines()[-2:]
            assert first.startswith("rank 0 is lost at step ") and " has not answered for " in first, path.read_text()
            assert second.startswith("  noticed by rank ")


def test_a_store_that_freezes_while_ranks_wait_for_one_of_them_is_named(tmp_path: Path) -> None:
    (tmp_path / "meeting.py").write_text(MEETING.replace("FAULT", "open('meets', 'w'); time.sleep(1000)"))
    with launched(3, ["meeting.py"], tmp_path) as ranks:
        end = time.monotonic() + 100
        while not (tmp_path / "meets").exists():
            assert time.monotonic() < end, ranks.said()
            time.sleep(0.02)
        assert ranks.store.pid is not None
        os.kill(ranks.store.pid, signal.SIGSTOP)
        ranks.wait_for([0, 1, 2], seconds=LIMIT_S)
        assert ranks.codes([0, 1, 2]) == [5, 5, 5]
        assert ranks.said().count("lost at step 0 in start-up: the store of all ranks at 127.0.0.1:") == 3
        assert ranks.said().count(": the process that hosts it (torchrun, or rank 0) is frozen\n") == 3


TORCHRUN = """
import os, sys
from trainer.distributed import torchrun
torchrun._RENDEZVOUS_S, torchrun._GRACE_S = 1, 1
os.environ["TURNOUT_REPORT"] = str(os.open("report", os.O_CREAT | os.O_WRONLY))
torchrun.run()
"""


def test_torchrun_does_not_wait_for_ever_for_a_store_that_is_frozen(tmp_path: Path) -> None:
    """Torch's own timeout of one second ends the first request, but not the next one."""
    (tmp_path / "torchrun.py").write_text(TORCHRUN)
    with store_apart() as (process, port):
        assert process.pid is not None
        os.kill(process.pid, signal.SIGSTOP)
        where = ["--nnodes", "2", "--node-rank", "1", "--master-addr", LOOPBACK, "--master-port", str(port)]
        done = imported_once.run(
            ["torchrun.py", *where, "--nproc-per-node", "1", "-m", "trainer"], cwd=tmp_path, timeout=60
        )
    assert done.returncode == 5, done.stderr
    said = json.loads((tmp_path / "report").read_text())["error"]
    assert said.startswith(f"cannot connect to the other nodes through {LOOPBACK}:{port}: "), said
    assert "Traceback" not in done.stderr


def test_a_rank_that_freezes_while_others_wait_for_its_work_is_named(tmp_path: Path) -> None:
    (tmp_path / "meeting.py").write_text(MEETING.replace("FAULT", "os.kill(os.getpid(), signal.SIGSTOP)"))
    with launched(3, ["meeting.py"], tmp_path) as ranks:
        ranks.wait_for([1, 2], seconds=100)
        assert ranks.codes([1, 2]) == [5, 5]
        assert "rank 0 is lost at step 0 in start-up" in ranks.said()


def test_ranks_that_cannot_meet_say_where_they_tried(workplace: Path) -> None:
    alone = {"MASTER_ADDR": "no-such-host.invalid", "MASTER_PORT": "29500", "RANK": "0", "WORLD_SIZE": "2"}
    result = imported_once.run(["-m", "trainer", "train", "tiny.yaml"], cwd=workplace, environment=alone)
    assert result.returncode == 5, result.stderr
    expected = "rank 0: cannot join the other 1 ranks through no-such-host.invalid:29500: MASTER_ADDR: "
    assert result.stderr.startswith(expected) and len(result.stderr.splitlines()) == 1
