"""The first of two hosts freezes, loses its network or its power: the other one names it, and exits in time.

    python -m tests.chaos.hosts --times 10            needs network namespaces: root, or unprivileged user namespaces

Each trial starts `launch` on both hosts (tests/two_hosts.sh), lets them train, and does the harm at a random moment. It
is timed until host 2 has named rank 0, until its own rank has ended, and until `launch` there says so. Ends with 1 if
the second ever took longer than `parallel.timeout_s` and 5 seconds; with 77 where namespaces are not permitted.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from tests.end_to_end.tiny import CONFIG

ROOT = Path(__file__).parents[2]
TIMEOUT_S, MARGIN_S = 5.0, 5.0
_START_S, _LIMIT_S = 600.0, 60.0


def frozen() -> None:
    """Stop every process of host 1, whose kernel still answers."""
    for pid in of_host(1):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)


def cut_off() -> None:
    """Disconnect the hosts; both continue to run."""
    subprocess.run(["ip", "-n", "host1", "link", "set", "cable1", "down"], check=True)


def without_power() -> None:
    """Kill host 1 without its kernel closing any connection."""
    cut_off()
    for pid in of_host(1):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


HARMS: dict[str, Callable[[], None]] = {"frozen": frozen, "cut off": cut_off, "without power": without_power}


@dataclass(slots=True)
class Result:
    """How the trials of a harm went."""

    harm: str
    trials: int = 0
    named: list[float] = field(default_factory=list)
    """Seconds until host 2 has named rank 0."""
    ended: list[float] = field(default_factory=list)
    """Seconds until its rank has ended."""
    again: list[float] = field(default_factory=list)
    """Seconds until torchrun has ended there and `launch` says that it will start again; most of it is python's."""
    wrong: list[str] = field(default_factory=list)

    def line(self) -> str:
        """Return a row of the table."""
        return (
            f"| {self.harm} | {self.trials} | {self.trials - len(self.wrong)} | {_shown(self.named)} | "
            f"{_shown(self.ended)} | {_shown(self.again)} |"
        )


def of_host(number: int) -> list[int]:
    """Return the process ids in a host's network namespace."""
    home, found = Path(f"/run/netns/host{number}").stat().st_ino, []
    for folder in Path("/proc").glob("[1-9]*"):
        with suppress(OSError):
            if (folder / "ns/net").stat().st_ino == home:
                found.append(int(folder.name))
    return found


def trial(harm: Callable[[], None], draw: random.Random, result: Result) -> None:
    """Do it once."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "tiny.yaml").write_text(CONFIG)
        (folder / "text.txt").write_text("It was a bright cold day in April, and the clocks were striking. " * 200)
        hosts = [_start(folder, number) for number in (1, 2)]
        try:
            _wait_for_step(folder, 3)
            time.sleep(draw.random())
            harm()
            _judge(folder, time.monotonic(), result)
        finally:
            for host in hosts:
                host.kill()
            for pid in of_host(1) + of_host(2):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            for host in hosts:
                host.wait()
            subprocess.run(["ip", "-n", "host1", "link", "set", "cable1", "up"], check=True)


def _start(folder: Path, number: int) -> subprocess.Popen[bytes]:
    options = [f"parallel.timeout_s={TIMEOUT_S}", "train.steps=1000000", "parallel.ep_size=2"]
    command = [sys.executable, "-m", "trainer", "launch", "tiny.yaml", "--nnodes", "2", *options]
    with (folder / f"stderr.{number}").open("wb") as errors:
        return subprocess.Popen(
            ["on_host", str(number), *command],
            cwd=folder,
            env={**os.environ, "NODE_RANK": str(number - 1), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL,
            stderr=errors,
        )


def _wait_for_step(folder: Path, step: int) -> None:
    metrics, end = folder / "runs/tiny/metrics.jsonl", time.monotonic() + _START_S
    while not metrics.is_file() or sum('"loss"' in line for line in metrics.read_text().splitlines()) < step:
        if time.monotonic() > end:
            raise TimeoutError("".join((folder / f"stderr.{number}").read_text() for number in (1, 2)))
        time.sleep(0.02)


def _judge(folder: Path, began: float, result: Result) -> None:
    """Wait for what host 2 says and for the end of its rank, and time it."""
    errors = folder / "stderr.2"
    rank = int(json.loads((folder / "runs/tiny/status/rank00001.json").read_text())["pid"])
    named = ended = again = None
    while again is None and time.monotonic() < began + _LIMIT_S:
        time.sleep(0.02)
        said, took = errors.read_text(), time.monotonic() - began
        if named is None and "rank 0 is lost at step " in said:
            named = took
        if ended is None and _has_ended(rank):
            ended = took
        if "ended with 5" in said:
            again = took
    result.trials += 1
    for times, took in ((result.named, named), (result.ended, ended), (result.again, again)):
        if took is not None:
            times.append(took)
    if named is None or ended is None or ended > TIMEOUT_S + MARGIN_S:
        result.wrong.append(f"{result.harm}: named after {named} s, ended after {ended} s: {errors.read_text()}")


def _has_ended(pid: int) -> bool:
    """Return whether a process has ended, or is a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def _shown(values: list[float]) -> str:
    return f"median {median(values):.1f} s, most {max(values):.1f} s" if values else "never"


def main() -> None:
    """Parse, try, and say how it went."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=list(HARMS))
    parser.add_argument("--json", type=Path, help="where the seconds are written")
    options = parser.parse_args()
    if "IN_A_NAMESPACE" not in os.environ:
        beside = [str(ROOT / "tests/two_hosts.sh"), "--beside", sys.executable, "-m", "tests.chaos.hosts"]
        os.execve(beside[0], [*beside, *sys.argv[1:]], {**os.environ, "PYTHONPATH": str(ROOT)})
    results, draw = [Result(name) for name in HARMS if options.only in (None, name)], random.Random(options.seed)
    for result in results:
        for _ in range(options.times):
            trial(HARMS[result.harm], draw, result)
        print(result.line(), flush=True)
    if options.json is not None:
        options.json.write_text(
            json.dumps({result.harm: [result.named, result.ended, result.again] for result in results})
        )
    wrong = [text for result in results for text in result.wrong]
    print("\n".join(wrong) or f"all named, and ended within {TIMEOUT_S + MARGIN_S:.0f} s")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
