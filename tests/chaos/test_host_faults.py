"""Some of the faults of hosts and of the cable between them; tests.chaos.host_faults has all, any number of times."""

import subprocess
import sys

import pytest

from tests.end_to_end.tiny import environment
from tests.launched_ranks import ROOT

CHOSEN = ("first host lost", "clock ahead")


@pytest.fixture(scope="module")
def said() -> str:
    """Return the rows of the chosen faults."""
    beside = [str(ROOT / "tests/two_hosts.sh"), "--beside"]
    command = [*beside, sys.executable, "-m", "tests.chaos.host_faults", *(f"--only={fault}" for fault in CHOSEN)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    if done.returncode == 77:
        pytest.skip(f"network namespaces are not permitted here: {done.stderr.strip()}")
    return done.stdout + done.stderr


@pytest.mark.nightly
@pytest.mark.parametrize("fault", CHOSEN)
def test_a_fault_of_a_host_is_named_and_nothing_is_lost(said: str, fault: str) -> None:
    assert f"| {fault} | 1 | as required |" in said, said
