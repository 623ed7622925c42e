"""A run on one machine cannot be reached from another, and data written by an attacker is not executed.

Where network namespaces are not permitted the listening sockets are looked at instead: test_supervise.py.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.end_to_end.tiny import environment, make_workplace
from tests.launched_ranks import ROOT


def test_from_another_host_nothing_answers_and_writing_to_the_store_executes_nothing(tmp_path: Path) -> None:
    make_workplace(tmp_path, dtype="float32")
    hostile = environment() | {"PET_STANDALONE": "1"}  # torchrun's own way to a store that everybody may write to
    command = [ROOT / "tests/two_hosts.sh", sys.executable, "-m", "tests.strangers"]
    done = subprocess.run(command, cwd=tmp_path, env=hostile, capture_output=True, text=True, timeout=200)
    if done.returncode == 77:
        pytest.skip(f"network namespaces are not permitted here, so no stranger was tried: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["answered"] == [found["control"]], "every port of the host of the run was tried, from the other one"
    assert {port for _, port in found["run"]} < set(found["ports"])
    assert {address for address, _ in found["run"]} == {"127.0.0.1"} and len(found["run"]) >= 3
    assert found["stores"] and found["is_training"] and not found["executed"]
