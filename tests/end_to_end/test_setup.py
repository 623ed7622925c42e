"""scripts/setup.sh, scripts/test.sh and launch.sh, in a copy of the checkout, with a pip that only pretends.

Nothing is downloaded: `python -m pip` finds FAKE_PIP (through PYTHONPATH), which honours constraints as pip does, so
that a torch that setup.sh would replace is replaced here too. Every interpreter in sight is a bare environment below
the test's own folder, so that not even a wrong script reaches a real one. PATH holds only the tools the scripts use.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TORCH = (ROOT / "constraints.txt").read_text().split("torch==")[1].split()[0]
TOOLS = "bash env dirname mkdir mv rm tail cat grep sort wc nproc getconf lscpu flock sh sleep"

FAKE_PIP = """
import os, pathlib, sys, sysconfig, time
site = pathlib.Path(sysconfig.get_path("purelib"))
arguments = sys.argv[1:]
calls = pathlib.Path(os.environ["CALLS"])
assert calls.parent in site.parents, f"{site} is not the test's own"
pinned = pathlib.Path(arguments[arguments.index("-c") + 1]).read_text().split("torch==")[1].split()[0]
with calls.open("a") as file:
    print("pip", arguments[arguments.index("-e") + 1], pinned, sys.prefix, file=file)
behaviour = os.environ.get("FAKE_PIP", "")
if behaviour == "no network":
    sys.exit("ERROR: no network")
print("Installing collected packages: torch, turnout", flush=True)
if behaviour == "disk full":
    sys.exit("ERROR: no space left on device")
if behaviour == "hang":
    (calls.parent / "installing").touch()
    time.sleep(60)
if behaviour == "slow":
    time.sleep(0.5)
for old in site.glob("torch-*"):
    (old / "METADATA").unlink()
    old.rmdir()
(site / f"torch-{pinned}.dist-info").mkdir()
(site / f"torch-{pinned}.dist-info" / "METADATA").write_text(f"Name: torch\\nVersion: {pinned}\\n")
(site / "torch.py").touch()
(site / "turnout.pth").write_text(str(pathlib.Path.cwd()))
"""

FAKE_TRAINER = """
import os, sys
print("trainer", sys.argv[1:], "threads", os.environ["OMP_NUM_THREADS"])
sys.exit(int(os.environ.get("TRAINER_EXIT", "0")))
"""

# Stands for python -m NAME: notes its arguments, and fails where FAILS names it.
FAKE_CHECK = """
import os, sys
def run():
    with open(os.environ["CALLS"], "a") as file:
        print(NAME, *sys.argv[1:], file=file)
    print(NAME, "speaks")
    failures = dict(pair.split("=") for pair in os.environ.get("FAILS", "").split())
    sys.exit(int(failures.get(NAME, "0")))
if __name__ == "__main__":
    run()
"""


class Clone:
    """A copy of what the scripts need, in a folder with a space, and a shell without anything else."""

    def __init__(self, folder: Path, bare: Path) -> None:
        self.folder = folder  # where commands run
        self.root = folder / "my clone"
        self.calls = folder / "calls"
        self.bin = folder / "bin"
        self.environment = {
            "PATH": f"{self.bin}:{folder / 'tools'}",
            "PYTHONPATH": str(folder / "fakes"),
            "CALLS": str(self.calls),
            "HOME": str(folder),
        }
        for sub in ("my clone/scripts", "my clone/trainer", "my clone/configs", "bin", "tools", "fakes/pip"):
            (folder / sub).mkdir(parents=True)
        for name in ("launch.sh", "scripts/setup.sh", "scripts/test.sh", "pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, self.root / name)
        (self.root / "trainer/__init__.py").touch()
        (self.root / "trainer/__main__.py").write_text(FAKE_TRAINER)
        (folder / "fakes/pip/__main__.py").write_text(FAKE_PIP)
        (folder / "fakes/pip/__init__.py").touch()
        self.bare = bare
        for tool in TOOLS.split():
            if path := shutil.which(tool):
                (folder / "tools" / tool).symlink_to(path)
        self.python("python3")

    def python(self, name: str, patch: str = "") -> None:
        """Put an interpreter on PATH that notes its calls, and runs `patch` before it describes itself."""
        prelude = f"import sys; code = sys.argv[1]; sys.argv[1:] = sys.argv[2:]; {patch}; exec(code)"
        describe = f"""shift; exec "{self.bare}" -c '{prelude}' "$@" """ if patch else ":"
        (self.bin / name).write_text(
            f"""#!/bin/sh
            if [ "$1" = -c ]; then {describe}
            else echo "{name} $2" >>"$CALLS"; fi
            if [ "$2" = venv ]; then shift 2; set -- -m venv --without-pip "$@"; fi
            exec "{self.bare}" "$@"
            """
        )
        (self.bin / name).chmod(0o755)

    def start(self, *command: str, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [str(self.root / command[0]), *command[1:]],
            cwd=self.folder,
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        process = self.start(*command, **environment)
        out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess(command, process.returncode, out.strip(), err.strip())

    def setup(self, level: str = "launch", **environment: str) -> str:
        """The interpreter that setup.sh names."""
        result = self.run("scripts/setup.sh", level, **environment)
        assert result.returncode == 0, result.stderr
        return result.stdout

    def new_calls(self) -> list[str]:
        """What was called since the last look: "pip WHAT TORCH PREFIX" or "PYTHON MODULE"."""
        lines = self.calls.read_text().splitlines() if self.calls.exists() else []
        self.calls.unlink(missing_ok=True)
        return lines

    @property
    def own_python(self) -> str:
        return str(self.root / ".venv/bin/python")

    def pip_call(self, what: str = ".") -> str:
        return f"pip {what} {TORCH} {self.root / '.venv'}"


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter without packages."""
    prefix = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(prefix)], check=True)
    return prefix / "bin/python"


@pytest.fixture
def clone(tmp_path: Path, bare: Path) -> Clone:
    return Clone(tmp_path, bare)


@pytest.fixture
def chosen(tmp_path: Path) -> Callable[..., Path]:
    """Makes an environment that somebody already has."""

    def make(folder: str = "their env", torch: str | None = "2.12.0+cu130", source: str = "") -> Path:
        prefix = tmp_path / folder
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(prefix)], check=True)
        if torch:
            (site,) = prefix.glob("lib/python*/site-packages")
            (site / f"torch-{torch}.dist-info").mkdir()
            (site / f"torch-{torch}.dist-info/METADATA").write_text(f"Name: torch\nVersion: {torch}\n")
            (site / "torch.py").write_text(source)
        return prefix

    return make


def installed_torch(prefix: Path) -> list[str]:
    return [path.name for path in prefix.glob("lib/python*/site-packages/torch-*")]


def test_the_first_call_makes_a_venv_and_the_second_calls_neither_pip_nor_venv(clone: Clone) -> None:
    assert clone.setup() == clone.own_python
    assert clone.new_calls() == ["python3 venv", clone.pip_call()]
    assert clone.setup() == clone.own_python
    assert clone.new_calls() == []


def test_the_dev_level_is_installed_once_and_includes_the_launch_level(clone: Clone) -> None:
    clone.setup("launch")
    clone.new_calls()
    clone.setup("dev")
    assert clone.new_calls() == [clone.pip_call(".[dev]")]
    clone.setup("launch")
    clone.setup("dev")
    assert clone.new_calls() == []


def test_a_changed_requirement_is_installed_into_the_same_venv(clone: Clone) -> None:
    clone.setup()
    clone.new_calls()
    for name in ("pyproject.toml", "constraints.txt"):
        with (clone.root / name).open("a") as file:
            file.write("# changed\n")
        clone.setup()
        clone.setup()
        assert clone.new_calls() == [clone.pip_call()]


def test_an_unknown_level_is_refused(clone: Clone) -> None:
    result = clone.run("scripts/setup.sh", "all")
    assert (result.returncode, result.stderr) == (1, "setup: unknown level 'all'; use launch or dev")


def test_a_killed_install_is_repaired_from_scratch(clone: Clone) -> None:
    clone.setup()
    process = clone.start("scripts/setup.sh", "dev", FAKE_PIP="hang")
    deadline = time.monotonic() + 30
    while not (clone.calls.parent / "installing").exists():
        assert time.monotonic() < deadline, "pip was never called"
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    leftover = clone.root / ".venv/half-a-package"
    leftover.touch()
    clone.new_calls()
    assert clone.setup() == clone.own_python
    assert clone.new_calls() == ["python3 venv", clone.pip_call()]
    assert not leftover.exists()


@pytest.mark.parametrize(("behaviour", "starts_afresh"), [("no network", False), ("disk full", True)])
def test_a_failed_install_shows_the_log_and_is_tried_again(clone: Clone, behaviour: str, starts_afresh: bool) -> None:
    result = clone.run("scripts/setup.sh", FAKE_PIP=behaviour)
    assert result.returncode == 1
    assert result.stdout == ""
    assert "ERROR: no " in result.stderr
    assert result.stderr.endswith("pip install failed (above: the end of .cache/setup/venv/log)")
    clone.new_calls()
    clone.setup()
    assert clone.new_calls() == ["python3 venv"] * starts_afresh + [clone.pip_call()]


def test_a_venv_that_was_made_without_a_network_still_works_after_a_failed_update(clone: Clone) -> None:
    clone.setup()
    requirements = clone.root / "constraints.txt"
    before = requirements.read_text()
    requirements.write_text(before + "# changed\n")
    assert clone.run("scripts/setup.sh", FAKE_PIP="no network").returncode == 1
    requirements.write_text(before)
    clone.new_calls()
    clone.setup(FAKE_PIP="no network")
    assert clone.new_calls() == []


def test_a_moved_checkout_gets_a_new_venv(clone: Clone) -> None:
    clone.setup()
    clone.new_calls()
    clone.root = clone.root.rename(clone.root.with_name("moved clone"))
    assert clone.setup() == clone.own_python
    assert clone.new_calls() == ["python3 venv", clone.pip_call()]


def test_python_too_old_is_named(clone: Clone) -> None:
    clone.python("python3", 'sys.version_info = (3, 9, 2, "final", 0)')
    clone.python("python", "sys.exit(1)")
    result = clone.run("scripts/setup.sh")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == (
        f"setup: needs Python 3.11 or newer; found {clone.bin}/python3 (3.9.2), {clone.bin}/python (does not run); "
        "install one, or set TURNOUT_PYTHON to its path"
    )
    assert not (clone.root / ".venv").exists()


def test_a_later_python_on_path_is_taken_when_the_first_is_not_suitable(clone: Clone) -> None:
    clone.python("python3", 'sys.version_info = (3, 9, 2, "final", 0)')
    clone.python("python", "sys.version_info = (3, 15, 0)")  # torch of constraints.txt has no wheel for it
    clone.python("python3.12")
    clone.setup()
    assert clone.new_calls() == ["python3.12 venv", clone.pip_call()]


def test_a_python_that_cannot_make_environments_is_told_which_package_it_lacks(clone: Clone) -> None:
    clone.python(
        "python3",
        "import importlib.util as u; find = u.find_spec;"
        'u.find_spec = lambda name: find(name) if name != "ensurepip" else None; sys.version_info = (3, 11, 2)',
    )
    result = clone.run("scripts/setup.sh")
    assert result.returncode == 1
    assert "python3.11 cannot make a virtual environment: its ensurepip or venv module is missing" in result.stderr
    assert "sudo apt install python3.11-venv" in result.stderr


@pytest.mark.parametrize("variable", ["TURNOUT_PYTHON", "VIRTUAL_ENV", "CONDA_PREFIX"])
def test_a_chosen_environment_is_used_and_keeps_its_torch(clone: Clone, chosen: Callable, variable: str) -> None:
    prefix = chosen()
    python = str(prefix / "bin/python")
    environment = {variable: python if variable == "TURNOUT_PYTHON" else str(prefix)}
    assert clone.setup(**environment) == python
    assert clone.new_calls() == [f"pip . 2.12.0+cu130 {prefix}"]
    assert clone.setup(**environment) == python
    assert clone.new_calls() == []
    assert installed_torch(prefix) == ["torch-2.12.0+cu130.dist-info"]
    assert not (clone.root / ".venv").exists()


@pytest.mark.parametrize(
    ("torch", "source"), [(None, ""), ("2.10.1", ""), ("2.12.0", "raise ImportError('libcudart')")]
)
def test_an_environment_without_a_usable_torch_is_left_alone(
    clone: Clone, chosen: Callable, torch: str | None, source: str
) -> None:
    prefix = chosen(torch=torch, source=source)
    before = sorted(prefix.rglob("[!_]*"))
    assert clone.setup(VIRTUAL_ENV=str(prefix)) == clone.own_python
    assert clone.new_calls() == ["python3 venv", clone.pip_call()]
    assert [path for path in sorted(prefix.rglob("[!_]*")) if path.suffix != ".pyc"] == before


def test_the_venv_of_another_checkout_is_not_taken_over(clone: Clone, tmp_path: Path, bare: Path) -> None:
    (tmp_path / "other").mkdir()
    other = Clone(tmp_path / "other", bare)
    other.setup()
    assert clone.setup(VIRTUAL_ENV=str(other.root / ".venv")) == clone.own_python
    assert clone.setup(VIRTUAL_ENV=str(clone.root / ".venv")) == clone.own_python
    other.new_calls()
    other.setup()
    assert other.new_calls() == []


def test_a_chosen_python_makes_the_venv_and_an_unusable_choice_is_an_error(clone: Clone) -> None:
    clone.python("mine")
    clone.python("old", 'sys.version_info = (3, 9, 2, "final", 0)')
    clone.setup(TURNOUT_PYTHON="mine")
    assert clone.new_calls() == ["mine venv", clone.pip_call()]
    result = clone.run("scripts/setup.sh", TURNOUT_PYTHON="old")
    assert (result.returncode, result.stderr) == (1, "setup: TURNOUT_PYTHON=old: Python 3.9.2; needs 3.11 or newer")
    result = clone.run("scripts/setup.sh", TURNOUT_PYTHON="nothing")
    assert (result.returncode, result.stderr) == (1, "setup: TURNOUT_PYTHON=nothing: no such command")


def test_a_venv_made_by_hand_is_installed_into_and_never_deleted(clone: Clone, chosen: Callable) -> None:
    prefix = chosen("my clone/.venv", torch=None)
    (prefix / "precious").touch()
    clone.setup()
    assert clone.new_calls() == [clone.pip_call()]
    clone.setup()
    assert clone.new_calls() == []
    (prefix / "bin/python").unlink()
    result = clone.run("scripts/setup.sh")
    assert result.returncode == 1
    assert "was not made by this script and has no working Python >= 3.11; move it away" in result.stderr
    assert (prefix / "precious").exists()


@pytest.mark.skipif(shutil.which("flock") is None, reason="without flock calls are not serialised")
def test_two_calls_at_once_install_once(clone: Clone) -> None:
    processes = [clone.start("scripts/setup.sh", FAKE_PIP="slow") for _ in range(2)]
    outputs = [process.communicate(timeout=60)[0].strip() for process in processes]
    assert outputs == [clone.own_python] * 2
    assert clone.new_calls() == ["python3 venv", clone.pip_call()]


def test_launch_passes_its_arguments_and_the_exit_code_on(clone: Clone) -> None:
    run = clone.run("launch.sh", "a b.yaml", "data.x={kind: text}", TRAINER_EXIT="75", OMP_NUM_THREADS="3")
    assert run.stdout == "trainer ['launch', 'a b.yaml', 'data.x={kind: text}'] threads 3"
    assert run.returncode == 75
    run = clone.run("launch.sh")
    assert f"['launch', '{clone.root}/configs/quickstart.yaml']" in run.stdout
    clone.folder = clone.root
    run = clone.run("launch.sh", "train.steps=3")
    assert re.fullmatch(
        r"trainer \['launch', 'configs/quickstart.yaml', 'train.steps=3'\] threads [1-9]\d*", run.stdout
    )


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("NPROC", "two", "NPROC=two: is not a number of at least 1"),
        ("NNODES", "0", "NNODES=0: is not a number of at least 1"),
        ("NNODES", "2", "NNODES=2 needs NODE_RANK as well"),
    ],
)
def test_a_wrong_number_of_processes_is_refused_before_anything(
    clone: Clone, name: str, value: str, complaint: str
) -> None:
    clone.environment[name] = value
    run = clone.run("launch.sh")
    assert run.returncode == 2
    assert run.stderr.startswith(f"launch.sh: {complaint}")
    assert clone.new_calls() == []


def test_several_processes_share_the_cores_and_have_one_exit_code(clone: Clone) -> None:
    clone.environment |= {"NPROC": "9999", "NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1"}
    run = clone.run("launch.sh", "x.yaml", "parallel.ep_size=2", TRAINER_EXIT="5")
    assert run.stdout == "trainer ['launch', 'x.yaml', 'parallel.ep_size=2'] threads 1"
    assert run.returncode == 5


def test_launch_help_installs_nothing_and_a_failed_setup_ends_it(clone: Clone) -> None:
    assert clone.run("launch.sh", "--help").stdout.startswith("usage: ./launch.sh [CONFIG] [a.b=c ...]")
    assert clone.new_calls() == []
    run = clone.run("launch.sh", FAKE_PIP="no network")
    assert (run.returncode, run.stdout) == (1, "")


@pytest.fixture
def checks(clone: Clone) -> Clone:
    fakes = Path(clone.environment["PYTHONPATH"])
    (fakes / "importlinter").mkdir()
    for name, path in [("ruff", "ruff.py"), ("pyrefly", "pyrefly.py"), ("pytest", "pytest.py")]:
        (fakes / path).write_text(f"NAME = {name!r}\n{FAKE_CHECK}")
    (fakes / "importlinter/cli.py").write_text(f"NAME = 'lint-imports'\n{FAKE_CHECK}\nlint_imports_command = run\n")
    clone.setup("dev")
    clone.new_calls()
    return clone


def test_every_check_runs_and_pytest_speaks_last(checks: Clone) -> None:
    run = checks.run("scripts/test.sh")
    assert run.returncode == 0
    pytest_call = "pytest -n 2 --dist loadfile"
    names = ["ruff format --check .", "ruff check .", "pyrefly check", "lint-imports", pytest_call]
    assert [call.split(" --python")[0] for call in checks.new_calls()] == names
    lines = run.stdout.splitlines()
    assert [line.split(" ok ")[0].strip() for line in lines[:4]] == [
        "ruff format",
        "ruff check",
        "pyrefly",
        "lint-imports",
    ]
    assert lines[4:] == ["pytest speaks"]


def test_a_failing_check_fails_the_run_after_pytest_has_run(checks: Clone) -> None:
    run = checks.run("scripts/test.sh", FAILS="pyrefly=1 lint-imports=1")
    assert run.returncode == 1
    assert "pyrefly speaks" in run.stdout
    assert "ruff speaks" not in run.stdout
    assert "FAILED: pyrefly, lint-imports (" in run.stdout
    assert run.stdout.endswith("pytest speaks")


def test_with_arguments_only_pytest_runs_and_no_tests_is_a_failure(checks: Clone) -> None:
    run = checks.run("scripts/test.sh", "tests/unit", "-k", "a b", FAILS="ruff=1 pytest=5")
    assert run.returncode == 5
    assert checks.new_calls() == ["pytest tests/unit -k a b"]


def test_the_versions_in_the_script_are_those_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    script = (ROOT / "scripts/setup.sh").read_text()
    major, minor = project["requires-python"].removeprefix(">=").split(".")
    assert f"sys.version_info[:2] < ({major}, {minor})" in script
    (torch,) = [name.removeprefix("torch>=") for name in project["dependencies"] if name.startswith("torch")]
    assert f">= ({torch.replace('.', ', ')})" in script
