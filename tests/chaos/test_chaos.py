"""The short form of the chaos suite, and that it knows every place where a run can be made to fail."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.chaos.kills import NEVER_THERE, POINTS
from tests.chaos.mutants import KILLED, STOPPED
from tests.launched import ROOT
from trainer.faults import planned

SCENARIOS = [
    "kills at named places",
    "kills at random",
    "stops at random",
    "disk full",
    "epochs under kills",
    "negative controls",
]


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_nothing_is_lost_and_every_broken_protection_is_noticed(scenario: str) -> None:
    """In a process of its own: ranks are forks, and must not inherit what tests have computed before."""
    command = [sys.executable, "-m", "tests.chaos.run", "--only", scenario]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    assert scenario in result.stdout


def test_ranks_are_killed_at_every_place_that_has_a_name() -> None:
    code = "\n".join(path.read_text() for path in Path(ROOT / "trainer").rglob("*.py"))
    named = set(re.findall(r'faults\.hit\("([^"]+)"\)', code))
    phases = set(re.findall(r'journal\.enter\("([^"]+)"\)', code))
    assert named | {f"phase.{phase.replace(' ', '_')}" for phase in phases} == POINTS | NEVER_THERE
    assert len(POINTS) >= 40


def test_a_fault_is_planted_by_name_time_and_rank() -> None:
    (fault,) = planned("a.b=kill,save.mid_file#3:1=full", "0")
    assert (fault.point, fault.action, fault.countdown) == ("a.b", "kill", 1)
    assert [fault.countdown for fault in planned("a.b=kill,save.mid_file#3:1=full", "1")] == [1, 3]
    with pytest.raises(ValueError, match=r"TURNOUT_FAULTS: save: is not POINT\[#TIME\]\[:RANK\]=ACTION"):
        planned("save", "0")


def test_the_documents_name_every_place_and_every_control() -> None:
    text = (ROOT / "docs/reliability.md").read_text()
    for point in POINTS:
        group, _, name = point.partition(".")
        (row,) = [line for line in text.splitlines() if line.startswith(f"| `{group}.` |")]
        assert f"`{name}`" in row, point
    for mutant in [*KILLED, *STOPPED]:
        assert f"- {mutant.__name__.replace('_', ' ')}" in text
