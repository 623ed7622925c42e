"""The list of planted faults does not rot; who plants them tells caught ones from others and leaves the tree alone."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.planted.fault import Fault
from tests.planted_faults import FAULTS, ROOT


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_listed_fault_can_still_be_planted(fault: Fault) -> None:
    assert fault.file.startswith("trainer/")
    planted = fault.planted(ROOT)
    assert planted is not None, f"{fault.file} does not have the old text exactly once: update {fault.name!r}"
    assert ast.dump(ast.parse(planted)) != ast.dump(ast.parse((ROOT / fault.file).read_text())), "it changes nothing"
    assert fault.tests
    for test in fault.tests:
        path, _, function = test.partition("[")[0].partition("::")
        assert f"def {function or 'test_'}" in (ROOT / path).read_text(), f"{test} is gone"


def test_names_are_names() -> None:
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)


SCRIPT = """
import sys
from pathlib import Path
from tests.planted.fault import Fault
from tests.planted_faults import try_all, try_out

def fault(name, old, new):
    return Fault(name=name, file="sums.py", old=old, new=new, tests=("test_sums.py",))

tree = Path(sys.argv[1])
faults = [
    fault("of what is tested", "a + b", "a * b"),
    fault("of what is not tested", "a - b", "b - a"),
    fault("of what is gone", "a % b", "a"),
    fault("of what is there twice", "return ", "return a"),
    fault("of grammar", "a + b", "a +"),
]
for name, verdict in try_all(faults, tree, timeout_s=200).items():
    print("found:", name, verdict)
print("found:", *try_out(fault("endless", "a + b", "__import__('time').sleep(1000)"), tree, timeout_s=0.1))
(tree / "test_sums.py").write_text("def test_add():\\n    assert False\\n")
try_all(faults, tree, timeout_s=200)
"""


def test_verdicts_are_right_and_the_tree_is_left_alone(tmp_path: Path) -> None:
    """On a tree of two files, in a process that has not begun to test."""
    (tmp_path / "sums.py").write_text("def add(a, b):\n    return a + b\n\n\ndef sub(a, b):\n    return a - b\n")
    (tmp_path / "test_sums.py").write_text("from sums import add\n\n\ndef test_add():\n    assert add(2, 1) == 3\n")
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    before = (tmp_path / "sums.py").read_bytes()
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},  # most of the time of such small tests
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert [line.removeprefix("found: ") for line in result.stdout.splitlines() if line.startswith("found: ")] == [
        "of what is tested caught",
        "of what is not tested survived",
        "of what is gone no longer applies",
        "of what is there twice no longer applies",
        "of grammar broken",
        "timed out after 0.1 s",
    ]
    assert (tmp_path / "sums.py").read_bytes() == before
    assert result.returncode == 1 and "these tests fail without a fault" in result.stderr
