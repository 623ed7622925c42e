"""A run on one host and an attacker on another, for tests/two_hosts.sh: `python -m tests.strangers` next to tiny.yaml.

host1 trains on two ranks under `launch`; a local stranger overwrites the keys of torchrun's store by pickles. host2
tries every port that anything on host1 listens on. What came of it is in found.json.
"""

import base64
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from tests.listening_sockets import listeners, of_host
from trainer.status import read_statuses

EXECUTED, READY, FOUND = Path("executed"), Path("ready.json"), Path("found.json")
_KEEP_ALIVE_S = 6.0
"""torchrun's dynamic rendezvous reads its key every five seconds."""


class Evil:
    """Object that runs code when unpickled."""

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(EXECUTED.absolute()),)


def write(path: Path, value: dict[str, Any]) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value))
    part.rename(path)


def wait_for(path: Path) -> None:
    end = time.monotonic() + 100
    while not path.exists():
        assert time.monotonic() < end, path
        time.sleep(0.05)


def attacked(pids: list[int]) -> list[int]:
    """Overwrite the stores of some processes, except for keys that ranks exchange; return their ports."""
    import torch.distributed as dist  # the stranger of the other host need not wait for it

    evil, ports = base64.b64encode(pickle.dumps(Evil())).decode(), []
    for address, port in listeners(pids):
        there = "127.0.0.1" if address in ("::", "0.0.0.0") else address
        store = dist.TCPStore(there, port, None, False, timedelta(seconds=10), wait_for_workers=False)
        ports.append(port)
        for key in store.list_keys():
            if not key.startswith("attempt_"):
                store.set(key, evil)
    return ports


def host_of_the_run() -> None:
    steps = ["train.steps=1000000", "eval.every=null", "checkpoint.every=null"]
    command = [sys.executable, "-m", "trainer", "launch", "tiny.yaml", "--nproc", "2", *steps]
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        wait_for(Path("runs/tiny/metrics.jsonl"))
        first = json.loads(Path("runs/tiny/status/rank00000.json").read_text())
        pids = [status.pid for status in read_statuses(Path("runs/tiny/status"), first["attempt"]).values()]
        torchrun = int(Path(f"/proc/{pids[0]}/stat").read_text().rpartition(")")[2].split()[1])
        ports = attacked([torchrun])
        everything = sorted(listeners([run.pid, torchrun, *pids]))
        with socket.create_server(("", 0)) as control:  # what a stranger can find
            began = time.monotonic()
            told = {"control": control.getsockname()[1], "ports": sorted({port for _, port in of_host()})}
            write(READY, told)
            wait_for(FOUND)
            time.sleep(max(0.0, began + _KEEP_ALIVE_S - time.monotonic()))
        found = {"stores": ports, "run": everything, "is_training": run.poll() is None, "executed": EXECUTED.exists()}
        write(FOUND, json.loads(FOUND.read_text()) | told | found)
    finally:
        run.send_signal(signal.SIGTERM)
        run.wait(60)


def host_of_the_stranger() -> None:
    wait_for(READY)
    answered = []
    for port in json.loads(READY.read_text())["ports"]:
        with socket.socket() as probe:
            probe.settimeout(10)
            if probe.connect_ex((os.environ["MASTER_ADDR"], port)) == 0:
                answered.append(port)
    write(FOUND, {"answered": answered})


if __name__ == "__main__":
    if os.environ["NODE_RANK"] == "0":
        host_of_the_run()
    else:
        host_of_the_stranger()
