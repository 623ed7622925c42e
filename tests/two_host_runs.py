"""On each of two hosts, by tests/two_hosts.sh: `launch` a run for every layout of LAYOUTS, one after the other.

    tests/two_hosts.sh python -m tests.two_host_runs tiny.yaml [NAME ...]

Python imports everything once on each host; `launch`, torchrun and the ranks are forks (tests/imported_once.py).
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from tests import imported_once


@dataclass(frozen=True, slots=True)
class Hosts:
    """A layout of both hosts."""

    overrides: tuple[str, ...]
    nproc: int = 1
    """Ranks of each host; neighbours in rank are on one host."""


LAYOUTS = {
    "ep": Hosts(("parallel.ep_size=2",)),
    "shard": Hosts(("parallel.data=shard",)),
    "cp_ulysses": Hosts(("parallel.cp_size=2",)),
    "cp_ring": Hosts(("parallel.cp_size=2", "parallel.cp=ring")),
    "tp": Hosts(("parallel.tp_size=2",)),
    "pp": Hosts(("parallel.pp_size=2",)),
    # Two of each host: stages are far apart, the ranks of a stage near; then experts over all, in shards of a host.
    "pp_of_ep": Hosts(("parallel.pp_size=2", "parallel.ep_size=2", "parallel.micro_batch_size=2"), nproc=2),
    "ep_of_hosts": Hosts(("parallel.ep_size=4", "parallel.data=shard", "parallel.shard_size=2"), nproc=2),
}
"""By the name of the run: each has a dimension whose ranks are on different hosts."""
_PORT = 29540


def main() -> int:
    """Launch the runs; return 1 unless all ended with 0."""
    config, *names = sys.argv[1:]
    failed = False
    for number, name in enumerate(LAYOUTS):
        if names and name not in names:
            continue
        hosts = LAYOUTS[name]
        command = ["-m", "trainer", "launch", config, "--nnodes", "2", "--nproc", str(hosts.nproc)]
        command += ["--master-port", str(_PORT + number), f"name={name}", *hosts.overrides]
        before = _bytes_of_cable()
        result = imported_once.run(command, cwd=Path.cwd(), timeout=120)
        print(f"{name}: {result.returncode}, {_bytes_of_cable() - before} bytes\n{result.stderr}", flush=True)
        failed = failed or result.returncode != 0
    return int(failed)


def _bytes_of_cable() -> int:
    """Return the bytes that this host has received and sent over the cable."""
    lines = Path("/proc/self/net/dev").read_text().splitlines()
    (line,) = [line for line in lines if line.strip().startswith(f"cable{int(os.environ['NODE_RANK']) + 1}:")]
    numbers = line.partition(":")[2].split()
    return int(numbers[0]) + int(numbers[8])


if __name__ == "__main__":
    sys.exit(main())
