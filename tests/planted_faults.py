"""Mutation tests: plant one-line faults, one at a time, and report those that the tests do not catch.

    python -m tests.planted_faults                      every fault of tests/planted/
    python -m tests.planted_faults --only rotary bias   faults with one of these words in their names
    python -m tests.planted_faults --list               their names

Each fault is planted in a copy of the tree, where its tests run until one fails. First all of these tests must pass
without a fault. Exits with 1 unless every fault is caught.

To add a fault, add a `Fault` to a list in tests/planted/.
"""

import argparse
import contextlib
import importlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NoReturn

import pytest

from tests.planted import (
    accounting,
    adapters,
    chats,
    checkpoints,
    conversions,
    data_order,
    diagnoses,
    experts,
    heads,
    imports,
    latents,
    libraries,
    measures,
    model,
    noise,
    overlaps,
    pages,
    pipelines,
    places,
    plans,
    predictions,
    ranks,
    replays,
    routing,
    rows,
    runs,
    spares,
    stages,
    steps,
    sweeps,
)
from tests.planted.fault import Fault

ROOT = Path(__file__).parents[1]
_TOPICS = (
    model,
    latents,
    places,
    plans,
    predictions,
    noise,
    accounting,
    experts,
    adapters,
    chats,
    data_order,
    steps,
    ranks,
    replays,
    routing,
    rows,
    checkpoints,
    imports,
    measures,
    runs,
    conversions,
    spares,
    stages,
    sweeps,
    pages,
    pipelines,
    overlaps,
    heads,
    libraries,
    diagnoses,
)
FAULTS: list[Fault] = [fault for topic in _TOPICS for fault in topic.FAULTS]

Verdict = Literal["caught", "survived", "no longer applies", "broken", "timed out"]
"""broken: pytest could not run, because the faulty file does not import or a named test does not exist."""

_VERDICTS: dict[int, Verdict] = {0: "survived", 1: "caught"}


def copy_of(root: Path, folder: Path) -> Path:
    """Copy the tracked and the untracked, not ignored files of a tree into a folder; return the folder."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=root,
        capture_output=True,
        check=True,
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (root / name).is_file() or (root / name).is_symlink():  # trainer/configs links to a folder
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, folder / name, follow_symlinks=False)
    return folder


def try_out(fault: Fault, tree: Path, *, timeout_s: float) -> tuple[Verdict, str]:
    """Plant a fault in a tree, run its tests and restore the file; return the verdict and a detail."""
    planted, path = fault.planted(tree), tree / fault.file
    if planted is None:
        return "no longer applies", f"{fault.file} does not have the old text exactly once"
    sound = path.read_text()
    path.write_text(planted)
    try:
        code, output = run_tests(fault.tests, tree, timeout_s=timeout_s)
    finally:
        path.write_text(sound)
    if code is None:
        return "timed out", f"after {timeout_s:g} s"
    failed = re.search(r"^(?:FAILED|ERROR) (.*?)(?: - |$)", output, flags=re.MULTILINE)
    verdict = _VERDICTS.get(code, "broken")
    return verdict, failed[1] if failed else output.strip().rpartition("\n")[2]


def run_tests(tests: Sequence[str], tree: Path, *, timeout_s: float) -> tuple[int | None, str]:
    """Run pytest in a tree until a test fails; return its exit code (None: timed out) and its output.

    Runs in a fork of this process, which has imported slow packages but nothing of the project.
    """
    with tempfile.TemporaryFile("w+") as output:
        child = os.fork()
        if child == 0:
            _become_pytest(tests, tree, output.fileno())
        os.setpgid(child, child)  # the child does the same; whichever is first
        code, end = None, time.monotonic() + timeout_s
        while code is None and time.monotonic() < end:
            ended, status = os.waitpid(child, os.WNOHANG)
            code = os.waitstatus_to_exitcode(status) if ended else None
            time.sleep(0.02)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # with any processes that it left behind
        if code is None:
            os.waitpid(child, 0)
        output.seek(0)
        return code, output.read()


def _become_pytest(tests: Sequence[str], tree: Path, output: int) -> NoReturn:
    code = 3  # pytest's code for an internal error
    try:
        os.setpgid(0, 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.chdir(tree)
        os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
        sys.dont_write_bytecode = True  # a stale .pyc would hide a second change within a second
        sys.path[:] = [str(tree), *(entry for entry in sys.path if entry and Path(entry) != ROOT)]
        for name in [name for name in sys.modules if name.partition(".")[0] in ("tests", "trainer")]:
            del sys.modules[name]
        code = int(pytest.main(["-x", "-q", "-ra", "--tb=no", "-p", "no:cacheprovider", *tests]))
        trainer = sys.modules.get("trainer")
        if trainer is not None and not Path(str(trainer.__file__)).is_relative_to(tree):
            print(f"the tests ran on {trainer.__file__} and not on the copy")
            code = 3
    finally:
        sys.stdout.flush()
        os._exit(code)


def try_all(faults: Sequence[Fault], root: Path, *, timeout_s: float) -> dict[str, Verdict]:
    """Try faults in a copy of a tree, printing a line for each; return the verdicts by name.

    Raises:
        SystemExit: if the tests do not pass without a fault.
    """
    with tempfile.TemporaryDirectory(prefix="planted-") as folder:
        tree = copy_of(root, Path(folder))
        tests = sorted({test for fault in faults for test in fault.tests})
        code, output = run_tests(tests, tree, timeout_s=max(timeout_s, 60.0 * len(tests)))
        if code != 0:
            raise SystemExit(f"{output}\nthese tests fail without a fault, so they prove nothing: {' '.join(tests)}")
        verdicts: dict[str, Verdict] = {}
        for fault in faults:
            began = time.monotonic()
            verdict, more = try_out(fault, tree, timeout_s=timeout_s)
            verdicts[fault.name] = verdict
            print(f"{verdict:18} {time.monotonic() - began:5.0f} s  {fault.name}  ({more})", flush=True)
    return verdicts


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.planted_faults", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="WORD", help="faults whose name has one of these in it")
    parser.add_argument("--list", action="store_true", help="print the names and end")
    parser.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS", help="for the tests of one fault")
    options = parser.parse_args()
    faults = [fault for fault in FAULTS if not options.only or any(word in fault.name for word in options.only)]
    if options.list:
        print("\n".join(fault.name for fault in faults))
        return 0
    if not faults:
        parser.error(f"no fault has {' or '.join(options.only)} in its name")
    os.environ["OMP_NUM_THREADS"] = "1"  # a fork inherits no threads
    for name in ("torch", "hypothesis", "pydantic", "transformers.models.mixtral.modeling_mixtral"):
        importlib.import_module(name)
    verdicts = try_all(faults, ROOT, timeout_s=options.timeout)
    caught = sum(verdict == "caught" for verdict in verdicts.values())
    print(f"{caught} of {len(verdicts)} caught")
    return 0 if caught == len(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
