"""Time from the loss of a machine to the next step, with a spare and without: processes as a user starts them.

    python -m tests.chaos.spare_times --times 3

Three machines, all of them this one, with a rank each. Without a spare, the lost machine's `launch` is started again
at once, as no scheduler is: what is left out is the time until one does it, and until that machine has booted.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from tests.end_to_end.tiny import CONFIG, environment

_LIMIT_S = 120.0


def seconds(folder: Path, *, spares: int) -> float:
    """Lose the second machine, and return the time until a step after the last one that was logged."""
    (folder / "tiny.yaml").write_text(CONFIG)
    (folder / "text.txt").write_text("It was a bright cold day in April, and the clocks were striking. " * 200)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = ["--nnodes", "2", "--spares", str(spares), "--master-addr", "127.0.0.1"]
        where += ["--master-port", str(free.getsockname()[1])]
    options = ["parallel.ep_size=2", "parallel.timeout_s=60", "train.steps=1000000", "checkpoint.every=10"]

    def start(machine: int) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "trainer", "launch", "tiny.yaml", *where, "--node-rank", str(machine)]
        with (folder / f"said.{machine}").open("ab") as said:
            return subprocess.Popen([*command, *options], cwd=folder, env=environment(), stdout=said, stderr=said)

    launches = [start(machine) for machine in range(2 + spares)]
    try:
        _wait(folder, 20)
        if spares:
            _wait_for(folder / "said.2", "waits")
        launches[1].kill()
        time.sleep(1.0)  # what was computed is logged
        done, began = _last_step(folder), time.monotonic() - 1.0
        if not spares:
            launches.append(start(1))
        _wait(folder, done + 1)
        return time.monotonic() - began
    finally:
        for launch in launches:
            launch.kill()
            launch.wait()


def _last_step(folder: Path) -> int:
    metrics = folder / "runs/tiny/metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def _wait(folder: Path, step: int) -> None:
    end = time.monotonic() + _LIMIT_S
    while _last_step(folder) < step:
        if time.monotonic() > end:
            raise TimeoutError("".join(path.read_text() for path in sorted(folder.glob("said.*"))))
        time.sleep(0.05)


def _wait_for(path: Path, text: str) -> None:
    end = time.monotonic() + _LIMIT_S
    while text not in path.read_text() and time.monotonic() < end:
        time.sleep(0.05)


def main() -> None:
    """Measure in turns, and print medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=3)
    found: dict[int, list[float]] = {0: [], 1: []}
    for _ in range(parser.parse_args().times):
        for spares, values in found.items():
            with tempfile.TemporaryDirectory() as folder:
                values.append(seconds(Path(folder), spares=spares))
    for spares, values in found.items():
        shown = ", ".join(f"{value:.1f}" for value in values)
        print(f"{spares} spares: median {median(values):.1f} s ({shown}), {os.cpu_count()} cores", flush=True)


if __name__ == "__main__":
    main()
