"""The lock, requirements/*.txt: it has all that pyproject.toml asks for, it is sound, and it is what runs here."""

import os
import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.markers import Marker
from packaging.requirements import Requirement

from scripts import check_newest
from scripts.locked import FOLDER, PINS, ROOT, closure, digest, normalised, parse, read

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]
FILES = {"hf": "dev", "lab": "recipes", "text-metrics": "recipes", "lm-eval": "dev", "tensorboard": "dev"}
"""File of the lock that has an extra; the other extras have a file of their own."""
ASKED = [
    ("pip", PROJECT["build-system"]["requires"]),
    ("base", PROJECT["project"]["dependencies"]),
    *((FILES.get(extra, extra), [x for x in lines if not x.startswith("turnout[")]) for extra, lines in EXTRAS.items()),
]
MADE_BY_SETUP = (Path(sys.prefix) / "made-by-turnout-setup").exists()


def needed_here(name: str) -> dict[str, str]:
    """The versions that a file of the lock, with those that it includes, has for this Python and platform."""
    pins = closure(name).values()
    return {pin.name: pin.version for pin in pins if not pin.marker or Marker(pin.marker).evaluate()}


def installed() -> dict[str, str]:
    """Every package of this environment; of torch, whichever build."""
    found = {normalised(one.metadata["Name"]): one.version for one in metadata.distributions(path=[_site()])}
    return found | {"torch": found["torch"].partition("+")[0]}


def _site() -> str:
    return str(next(Path(sys.prefix).glob("lib/python*/site-packages")))


def test_the_lock_was_made_from_pyproject_and_constraints_as_they_are() -> None:
    for name in PINS:
        recorded = re.findall(r"^# inputs: (\w+)$", (FOLDER / f"{name}.txt").read_text(), re.MULTILINE)
        assert recorded == [digest()], f"{name}.txt is out of date: python -m scripts.lock --keep"


def test_every_dependency_has_both_bounds_and_its_locked_version_is_inside() -> None:
    for name, lines in ASKED:
        pins = closure(name)
        for requirement in map(Requirement, lines):
            operators = {specifier.operator for specifier in requirement.specifier}
            assert operators == {">=", "<"}, f"{requirement} has no lower or no upper bound"
            assert requirement.specifier.contains(pins[normalised(requirement.name)].version), str(requirement)
    held = [Requirement(line) for line in re.findall(r"^\w.*?(?= #|$)", (ROOT / "constraints.txt").read_text(), re.M)]
    assert [requirement.name for requirement in held] == ["torch"]
    assert all(requirement.specifier.contains(read("base")[requirement.name].version) for requirement in held)


def test_every_package_is_in_one_file_with_hashes_and_no_address() -> None:
    packages = [pin for name in PINS if name != "torch-cpu" for pin in read(name).values()]
    assert len({pin.name for pin in packages}) == len(packages) > 100
    for pin in [*packages, *read("torch-cpu").values()]:
        assert len(pin.hashes) == len(set(pin.hashes)) >= 1, f"{pin.name} has no hash"
    for path in FOLDER.iterdir():
        assert "://" not in path.read_text() and "index" not in path.read_text().partition("==")[0], path.name
    (cpu,) = read("torch-cpu").values()
    assert cpu.version == f"{read('base')['torch'].version}+cpu"


@pytest.mark.parametrize("line", ["torch>=2.11", "torch", "torch==2 --hash=md5:00", "torch @ file:///x", "-e ."])
def test_a_line_that_pins_nothing_is_not_read_over(line: str) -> None:
    with pytest.raises(ValueError, match="not a package with its version and hashes"):
        list(parse(f"numpy==2.0 --hash=sha256:{'0' * 64}\n{line}\n"))


@pytest.mark.skipif(not MADE_BY_SETUP, reason="an environment that somebody chose keeps what fits")
def test_this_environment_is_the_lock() -> None:
    here = installed()
    locked = needed_here("dev")
    assert {name: here.get(name) for name in locked} == locked
    if os.environ.get("CI"):  # a developer may have added a tool
        assert set(here) - set(locked) - set(read("cuda")) == {"turnout"}


def test_nothing_that_is_locked_lacks_anything() -> None:
    """Set-up asks pip for no dependencies: all of them must be in the lock, in versions that go together."""
    here = installed()
    extras = {"lm-eval": "hf"}
    for name in needed_here("dev"):
        for line in metadata.requires(name) or []:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": extras.get(name, "")}):
                version = here.get(normalised(requirement.name))
                assert version is not None, f"{name} requires {line}"
                assert requirement.specifier.contains(version, prereleases=True), (
                    f"{name} requires {line}, not {version}"
                )


def test_nothing_installs_but_set_up_and_what_looks_after_the_lock() -> None:
    files = [*ROOT.glob("scripts/**/*.py"), *ROOT.glob("scripts/*.sh"), *ROOT.glob(".github/workflows/*.yml")]
    files += [ROOT / "launch.sh", ROOT / ".ci/run"]
    call = re.compile(r"-m pip|\"-m\", \"pip\"|^\s*(sudo )?(pip3?|uv|conda|npm|apt-get) |curl |wget ", re.MULTILINE)
    calling = {path.name for path in files if call.search(path.read_text())}
    assert calling == {"check_newest.py", "install.py", "lock.py"}


def test_ci_runs_set_up_and_the_newest_are_tried_apart_from_it() -> None:
    workflows = {path.stem: yaml.safe_load(path.read_text()) for path in ROOT.glob(".github/workflows/*.yml")}
    commands = {}
    for name, workflow in workflows.items():
        assert workflow["permissions"] == {"contents": "read"}
        (job,) = workflow["jobs"].values()
        assert "timeout-minutes" in job and job["runs-on"] != "ubuntu-latest"
        used = [step["uses"] for step in job["steps"] if "uses" in step]
        assert used and all(re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40}", action) for action in used)
        commands[name] = [step["run"] for step in job["steps"] if "run" in step]
    ci, nightly, newest = ["./scripts/test.sh fast", ".ci/run"], ["./scripts/test.sh full"], "scripts.check_newest"
    assert commands == {"ci": ci, "nightly": nightly, "newest": [f"python -m {newest}"]}
    conditions = [step.get("if") for step in workflows["ci"]["jobs"]["test"]["steps"] if "run" in step]
    assert conditions == ["github.event_name == 'pull_request'", "github.event_name != 'pull_request'"]
    scheduled = {name for name, workflow in workflows.items() if "schedule" in workflow[True]}  # YAML 1.1 reads `on` so
    assert scheduled == {"nightly", "newest"}
    pythons = workflows["ci"]["jobs"]["test"]["strategy"]["matrix"]["python"]
    minor = "Programming Language :: Python :: 3."
    classifiers = [line for line in PROJECT["project"]["classifiers"] if line.startswith(minor)]
    assert pythons == [line.rpartition(" ")[2] for line in classifiers] == ["3.11", "3.12", "3.13"]


def test_the_table_of_the_newest_shows_what_differs() -> None:
    numpy, torch = read("base")["numpy"].version, read("base")["torch"].version
    there = {"numpy": numpy, "torch": f"{torch}+cpu", "scipy": "99.0", "new": "1.0", "rich": "1", "turnout": "0.1.0"}
    lines = check_newest.table(there, {"numpy": "77.0", "rich": "2"})
    rows = {cells[0]: cells[1:] for cells in ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)}
    assert rows.keys() == {"package", "---", "numpy", "scipy", "new", "rich", ""}
    assert rows["numpy"] == [numpy, numpy, "77.0"]
    assert rows["scipy"] == [read("recipes")["scipy"].version, "99.0", ""]
    assert rows["new"] == ["-", "1.0", ""]
