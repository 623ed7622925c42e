"""Two hosts, each with its own address, learn what one process does, with each dimension of a layout across them."""

import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from tests.end_to_end import tiny
from tests.end_to_end.tiny import environment, make_workplace, numbers, run
from tests.launched_ranks import ROOT
from tests.samples import chosen, nightly_but
from tests.two_host_runs import LAYOUTS

EVERY_PUSH = {"tp", "pp_of_ep", "ep_of_hosts"}
assert_same = partial(tiny.assert_same, rel=1e-9, abs=1e-9)


@pytest.fixture(scope="module")
def workplace(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with the run `alone` and one of each chosen layout, and what was said of these, `said`."""
    folder = make_workplace(tmp_path_factory.mktemp("two_hosts"), dtype="float64")
    config = folder / "tiny.yaml"
    text = config.read_text().replace("steps: 8", "steps: 4").replace("every: 4", "every: 2")
    config.write_text(text.replace(", routing_gap_every: 2", ""))  # no stage has all routers
    run(folder, "train", "tiny.yaml", "name=alone")
    command = [str(ROOT / "tests/two_hosts.sh"), sys.executable, "-m", "tests.two_host_runs", "tiny.yaml"]
    command += chosen(request, "name")
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=300)
    if done.returncode == 77:
        pytest.skip(f"network namespaces are not permitted here: {done.stderr.strip()}")
    (folder / "said").write_text(done.stdout + done.stderr)
    return folder


@pytest.mark.parametrize("name", nightly_but(EVERY_PUSH, LAYOUTS))
def test_a_dimension_across_two_hosts_learns_what_one_process_does(workplace: Path, name: str) -> None:
    said = (workplace / "said").read_text()
    ended = re.findall(rf"^{name}: (-?\d+), (\d+) bytes", said, re.MULTILINE)
    assert [code for code, _ in ended] == ["0", "0"], said
    assert min(int(crossed) for _, crossed in ended) > 500_000, "a start alone takes some 60,000"
    assert_same(workplace, name)
    assert len(numbers(workplace, name)) > 4 * 10
