"""Faults of one of two hosts or of the cable between them: named with the right exit code, and nothing is lost.

    python -m tests.chaos.host_faults [--times 10] [--only cable]    root, or unprivileged user namespaces

`launch` runs on both hosts (tests/two_hosts.sh; all processes are forks). A fault comes at a random moment; what was
lost is started again, as its scheduler would. Then everything is compared with an undisturbed run, bit for bit, by
the checks of tests.chaos.workload. Ends with 1 if anything was wrong, with 77 where namespaces are not permitted.
"""

import argparse
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests import imported_once
from tests.chaos.hosts import ROOT, of_host
from tests.chaos.workload import Outcome, Workload, damage, differences, outcome
from tests.held_steps import HeldSteps

_LIMIT_S = 100.0
_STEPS = 60
_OPTIONS = (f"train.steps={_STEPS}", "checkpoint.every=10", "eval.every=25", "parallel.timeout_s=5")
_LOST = r"(?s)(rank {rank} is lost|the node that hosts it \(the first\) is lost).*ended with 5"
_NOTICED = r"(?s)(rank \d is lost at step|the network between them failed).*ended with 5"
_DAY_S = 86400


@dataclass(slots=True)
class Hosts:
    """Both hosts with one run, which has not begun yet."""

    workload: Workload
    clocks_s: dict[int, int] = field(default_factory=dict)
    """By how many seconds the clocks of a host are ahead."""
    launches: dict[int, imported_once.Process] = field(default_factory=dict)
    said: dict[int, list[Path]] = field(default_factory=lambda: {1: [], 2: []})
    """Files with what the launches of a host printed as warnings and errors, oldest first."""

    @property
    def held(self) -> HeldSteps:
        """The step that is not taken before the fault has come."""
        return HeldSteps(self.workload.folder / "held", (_STEPS // 2 + 1,))

    def start(self, number: int) -> None:
        """Start `launch` on a host; again if it was killed."""
        folder, starts = self.workload.folder, len(self.said[number])
        self.said[number].append(folder / f"err.{number}.{starts}")
        launch = ["launch", "chaos.yaml", "--nnodes", "2", "--node-rank", str(number - 1)]
        launch += ["--master-addr", "10.77.0.1", f"parallel.ep_size={self.workload.ep_size}", *self.workload.overrides]
        self.launches[number] = imported_once.Process(
            ["-m", "tests.on_host", str(number), str(self.clocks_s.get(number, 0)), *launch],
            cwd=folder,
            stdout=folder / f"out.{number}.{starts}",
            stderr=self.said[number][-1],
            environment=self.held.environment(),
        )

    def kill(self, number: int) -> None:
        """Kill every process of a host."""
        for pid in of_host(number):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def wait_for_step(self, step: int) -> None:
        """Wait until a step is logged."""
        metrics = self.workload.run / "metrics.jsonl"
        self.wait(lambda: metrics.exists() and metrics.read_text().count('"loss"') >= step, f"step {step}")

    def wait_for(self, number: int, text: str) -> None:
        """Wait until a host has said something, a regular expression."""
        self.wait(lambda: re.search(text, self.text(number)) is not None, f"host {number}: {text}")

    def wait(self, done: Callable[[], bool], what: str) -> None:
        """Wait for something; raise a TimeoutError with what was said if it never comes."""
        end = time.monotonic() + _LIMIT_S
        while not done():
            if time.monotonic() > end:
                raise TimeoutError(f"{what}: never came; said {self.text(1)[-1500:]} and {self.text(2)[-1500:]}")
            time.sleep(0.02)

    def text(self, number: int) -> str:
        """Return what a host has said."""
        return "".join(path.read_text() for path in self.said[number] if path.exists())

    def finish(self) -> list[str]:
        """Wait for the end; return what is wrong with it."""
        codes = {number: launch.wait(_LIMIT_S) for number, launch in self.launches.items()}
        return [] if set(codes.values()) == {0} else [f"ended with {codes}: {self.text(1)} and {self.text(2)}"]


def first_host_lost(hosts: Hosts, draw: random.Random) -> list[str]:
    """Kill all processes of the host with rank 0 and the store."""
    return _host_lost(hosts, draw, 1)


def second_host_lost(hosts: Hosts, draw: random.Random) -> list[str]:
    """Kill all processes of the other one."""
    return _host_lost(hosts, draw, 2)


def _host_lost(hosts: Hosts, draw: random.Random, number: int) -> list[str]:
    _begin(hosts, draw)
    hosts.kill(number)
    hosts.held.release()
    hosts.wait_for(3 - number, _LOST.format(rank=number - 1))
    hosts.start(number)
    return hosts.finish()


def cable_cut(hosts: Hosts, draw: random.Random) -> list[str]:
    """Cut the cable until both sides have noticed; both hosts still run."""
    _begin(hosts, draw)
    _cable("down")
    hosts.held.release()
    for number in (1, 2):
        hosts.wait_for(number, _NOTICED)
    _cable("up")
    return hosts.finish()


def slow_link(hosts: Hosts, draw: random.Random) -> list[str]:
    """Let little through the cable, both ways: the run is slow and nobody is lost."""
    _begin(hosts, draw)
    with _Slow("4mbit"):
        hosts.held.release()
        wrong = hosts.finish()
    return wrong + [f"said {text}" for n in (1, 2) if "starting again" in (text := hosts.text(n))]


def stalled_link(hosts: Hosts, draw: random.Random) -> list[str]:
    """Let so little through that no collective ends in time; it passes."""
    _begin(hosts, draw)
    with _Slow("1kbit"):
        hosts.held.release()
        for number in (1, 2):
            hosts.wait_for(number, _NOTICED)
    return hosts.finish()


def clock_ahead(hosts: Hosts, draw: random.Random) -> list[str]:
    """Let a day lie between the clocks; a rank that is killed is named as ever, and so is no other."""
    return _clock_skew(hosts, draw, _DAY_S)


def clock_behind(hosts: Hosts, draw: random.Random) -> list[str]:
    """The same, the other way round."""
    return _clock_skew(hosts, draw, -_DAY_S)


def _clock_skew(hosts: Hosts, draw: random.Random, ahead_s: int) -> list[str]:
    hosts.clocks_s[2] = ahead_s
    _begin(hosts, draw)
    status = hosts.workload.run / "status/rank00001.json"
    os.kill(int(re.findall(r'"pid": (\d+)', status.read_text())[0]), signal.SIGKILL)
    hosts.held.release()
    hosts.wait_for(1, r"ended with 5 \(rank 1 is lost")
    hosts.wait_for(2, r"rank 1 \(pid \d+\) was killed by SIGKILL")
    return hosts.finish()


def _begin(hosts: Hosts, draw: random.Random) -> None:
    for number in (1, 2):
        hosts.start(number)
    hosts.wait_for_step(draw.randint(2, _STEPS // 2))


def _cable(state: str) -> None:
    subprocess.run(["ip", "-n", "host1", "link", "set", "cable1", state], check=True)


class _Slow:
    """The cable with a limit of its rate, both ways."""

    def __init__(self, rate: str) -> None:
        self.rate = rate

    def __enter__(self) -> None:
        for number in (1, 2):
            limit = f"tc -n host{number} qdisc add dev cable{number} root tbf rate {self.rate} burst 16kb latency 500ms"
            subprocess.run(limit.split(), check=True)

    def __exit__(self, *_: object) -> None:
        for number in (1, 2):
            subprocess.run(f"tc -n host{number} qdisc del dev cable{number} root".split(), check=True)


def _can_be_slow() -> bool:
    """Return whether tc is here, and the kernel can limit the rate of a link."""
    qdisc = ["tc", "-n", "host1", "qdisc"]
    limit = ["add", "dev", "lo", "root", "tbf", "rate", "1gbit", "burst", "1mb", "latency", "1ms"]
    if shutil.which("tc") is None or subprocess.run([*qdisc, *limit], capture_output=True).returncode:
        return False
    subprocess.run([*qdisc, "del", "dev", "lo", "root"], check=True)
    return True


FAULTS: dict[str, Callable[[Hosts, random.Random], list[str]]] = {
    function.__name__.replace("_", " "): function
    for function in (first_host_lost, second_host_lost, cable_cut, slow_link, stalled_link, clock_ahead, clock_behind)
}


def undisturbed(folder: Path) -> tuple[Workload, Outcome]:
    """Return a run that was left alone, and what it has left behind."""
    hosts = Hosts(Workload(folder / "undisturbed", 2, 2, _OPTIONS).prepare())
    hosts.held.release()
    for number in (1, 2):
        hosts.start(number)
    wrong = hosts.finish()
    assert not wrong, wrong
    return hosts.workload, outcome(hosts.workload)


def trial(name: str, folder: Path, known: tuple[Workload, Outcome], draw: random.Random) -> list[str]:
    """Let a fault happen; return what is wrong afterwards."""
    base, expected = known
    hosts = Hosts(Workload(folder / "trial", 2, 2, _OPTIONS).prepare(like=base))
    try:
        wrong = FAULTS[name](hosts, draw)
        return wrong + damage(hosts.workload) + differences(hosts.workload, expected)
    except (TimeoutError, subprocess.SubprocessError) as error:
        return [str(error)]
    finally:
        for number in (1, 2):
            hosts.kill(number)
        _cable("up")


def main() -> None:
    """Parse, try, and say how it went."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", metavar="TEXT", help="faults whose name has this text, or one of")
    options = parser.parse_args()
    if "IN_A_NAMESPACE" not in os.environ:
        beside = [str(ROOT / "tests/two_hosts.sh"), "--beside", sys.executable, "-m", "tests.chaos.host_faults"]
        os.execve(beside[0], [*beside, *sys.argv[1:]], {**os.environ, "PYTHONPATH": str(ROOT)})
    draw, failed = random.Random(options.seed), False
    with tempfile.TemporaryDirectory() as name:
        known = undisturbed(Path(name))
        for fault in (fault for fault in FAULTS if any(text in fault for text in options.only or [""])):
            began = time.monotonic()
            times = options.times if FAULTS[fault] not in (slow_link, stalled_link) or _can_be_slow() else 0
            wrong = [text for _ in range(times) for text in trial(fault, Path(name), known, draw)]
            print(f"| {fault} | {times} | {'as required' if not wrong else 'WRONG'} | ", end="")
            print(f"{time.monotonic() - began:.0f} s |", *wrong, sep="\n" if wrong else "", flush=True)
            failed = failed or bool(wrong)
    sys.exit(failed)


if __name__ == "__main__":
    main()
