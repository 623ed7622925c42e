"""Short form of the chaos suite, and checks that it covers every fault point."""

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import imported_once
from tests.chaos.kills import NEVER_THERE, POINTS
from tests.chaos.removed_protections import KILLED, STOPPED
from tests.chaos.run import scenarios
from tests.launched_ranks import ROOT
from tests.samples import chosen, nightly_but
from trainer.fault_injection import parse_faults

SCENARIOS = list(scenarios(release=False, seed=0))
EVERY_PUSH = {"kills at named places", "kills at random", "disk full for one save"}


@pytest.fixture(scope="module")
def lines(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Iterator[str]]:
    """Yield the output of one run of the chosen scenarios.

    In a process of its own: ranks are forks, and must not inherit the state of earlier tests.
    """
    command = ["-m", "tests.chaos.run", *(f"--only={name}" for name in chosen(request, "scenario"))]
    folder = tmp_path_factory.mktemp("said")
    process = imported_once.Process(command, cwd=ROOT, stdout=folder / "stdout", stderr=folder / "stderr")
    yield _lines(process, folder)
    process.kill()


def _lines(process: imported_once.Process, folder: Path) -> Iterator[str]:
    """Yield what a process prints, line by line, and its errors when it has ended."""
    while not (folder / "stdout").exists():
        time.sleep(0.05)
    line = ""
    with (folder / "stdout").open() as said:
        while True:
            has_ended = process.poll() is not None  # asked before reading: nothing comes afterwards
            line += said.readline()
            if line.endswith("\n"):
                yield line
                line = ""
            elif has_ended:
                break
            else:
                time.sleep(0.05)
    yield line + (folder / "stderr").read_text()


@pytest.mark.parametrize("scenario", nightly_but(EVERY_PUSH, SCENARIOS))
def test_nothing_is_lost_and_every_broken_protection_is_noticed(lines: Iterator[str], scenario: str) -> None:
    said = []
    for line in lines:
        said.append(line)
        if line.startswith(f"| {scenario} | "):
            break
    assert said and said[-1].startswith(f"| {scenario} | "), "".join(said)
    _, trials, as_it_must_be, *_ = said[-1].strip("| ").split(" | ")
    assert int(trials) == int(as_it_must_be) > 0, "".join(said)


def test_ranks_are_killed_at_every_place_that_has_a_name() -> None:
    code = "\n".join(path.read_text() for path in Path(ROOT / "trainer").rglob("*.py"))
    named = set(re.findall(r'fault_injection\.hit\("([^"]+)"\)', code))
    phases = set(re.findall(r'recorder\.enter\("([^"]+)"\)', code))
    assert named | {f"phase.{phase.replace(' ', '_')}" for phase in phases} == POINTS | NEVER_THERE
    assert len(POINTS) >= 40


def test_a_fault_is_planted_by_name_time_and_rank() -> None:
    (fault,) = parse_faults("a.b=kill,save.mid_file#3:1=full", "0")
    assert (fault.point, fault.action, fault.countdown) == ("a.b", "kill", 1)
    assert [fault.countdown for fault in parse_faults("a.b=kill,save.mid_file#3:1=full", "1")] == [1, 3]
    with pytest.raises(ValueError, match=r"TURNOUT_FAULTS: save: is not POINT\[#TIME\]\[:RANK\]=ACTION"):
        parse_faults("save", "0")


def test_the_documents_name_every_place_and_every_control() -> None:
    text = (ROOT / "docs/reliability.md").read_text()
    for point in POINTS:
        group, _, name = point.partition(".")
        (row,) = [line for line in text.splitlines() if line.startswith(f"| `{group}.` |")]
        assert f"`{name}`" in row, point
    for mutant in [*KILLED, *STOPPED]:
        assert f"- {mutant.__name__.replace('_', ' ')}" in text
