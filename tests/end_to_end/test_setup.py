"""Run scripts/setup.sh, scripts/test.sh and launch.sh in a copy of the checkout, with a fake pip.

Nothing is downloaded: through PYTHONPATH `python -m pip` runs FAKE_PIP, which installs only the torch that its
arguments pin, so that a torch that setup.sh would replace is replaced here too. All interpreters are bare environments
in the test's folder, so that a wrong script cannot reach a real one. PATH holds only the tools that the scripts use.
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

import packaging
import pytest

from scripts import install
from scripts.locked import Pin, closure, read

ROOT = Path(__file__).parents[2]
TORCH = read("base")["torch"].version
TOOLS = "bash env dirname mkdir mv rm tail cat grep sort wc nproc getconf lscpu flock sh sleep"

FAKE_PIP = """
import os, pathlib, re, sys, sysconfig, time
site = pathlib.Path(sysconfig.get_path("purelib"))
arguments = sys.argv[1:]
calls = pathlib.Path(os.environ["CALLS"])
assert calls.parent in site.parents, f"{site} is not the test's own"
def after(option):
    return arguments[arguments.index(option) + 1] if option in arguments else ""
def text(path):
    found = pathlib.Path(path).read_text()
    included = re.findall(r"^-r (\\S+)$", found, re.MULTILINE)
    return found + "".join(text(pathlib.Path(path).parent / name) for name in included)
what = after("-e") or after("-r") or " ".join(arguments)
options = [name for name in ("--require-hashes", "--no-deps", "--no-build-isolation") if name in arguments]
with calls.open("a") as file:
    print("pip", what, *options, sys.prefix, file=file)
behaviour = os.environ.get("FAKE_PIP", "")
if behaviour == "no network":
    sys.exit("ERROR: no network")
files = [name for name in (after("-r"), after("-c")) if name]
if "requirements/torch-cpu.txt" in files and "CPU_BUILD" not in os.environ:
    sys.exit("ERROR: No matching distribution found for torch")
pins = re.findall(r"^torch==(\\S+)", "".join(map(text, files)), re.MULTILINE)
print("Collecting torch==2.0 (from nowhere)", flush=True)
if behaviour == "slow":
    time.sleep(0.5)
print("Installing collected packages: torch, turnout", flush=True)
if behaviour == "disk full":
    sys.exit("ERROR: no space left on device")
if behaviour == "hang" and pins:
    (calls.parent / "installing").touch()
    time.sleep(60)
for old in site.glob("torch-*") if pins else []:
    (old / "METADATA").unlink()
    old.rmdir()
for pinned in set(pins):
    (site / f"torch-{pinned}.dist-info").mkdir()
    metadata = f"Name: torch\\nVersion: {pinned}\\n" + os.environ.get("TORCH_ASKS_FOR", "")
    (site / f"torch-{pinned}.dist-info" / "METADATA").write_text(metadata)
    (site / "torch.py").touch()
if "-e" in arguments:
    (site / "turnout.pth").write_text(str(pathlib.Path.cwd()))
"""

FAKE_TRAINER = """
import os, sys
print("trainer", sys.argv[1:], "threads", os.environ["OMP_NUM_THREADS"])
sys.exit(int(os.environ.get("TRAINER_EXIT", "0")))
"""

# Replaces `python -m NAME`: records its arguments, and fails if FAILS names it.
PYTEST = "pytest -n 4 --dist loadfile --no-loadscope-reorder"
PYTEST_OF_A_PUSH = f"{PYTEST} -m not nightly"
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
    """A copy of the files that the scripts need, in a folder with a space in its name, and a minimal shell."""

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
        for sub in (
            "my clone/.ci",
            "my clone/scripts",
            "my clone/trainer",
            "my clone/configs",
            "bin",
            "tools",
            "fakes/pip",
        ):
            (folder / sub).mkdir(parents=True)
        scripts = ("__init__.py", "install.py", "locked.py", "setup.sh", "test.sh")
        for name in (".ci/run", "launch.sh", "pyproject.toml", *(f"scripts/{name}" for name in scripts)):
            shutil.copy(ROOT / name, self.root / name)
        shutil.copytree(ROOT / "requirements", self.root / "requirements")
        (self.root / "trainer/__init__.py").touch()
        (self.root / "trainer/__main__.py").write_text(FAKE_TRAINER)
        (folder / "fakes/pip/__main__.py").write_text(FAKE_PIP)
        (folder / "fakes/pip/__init__.py").touch()
        (folder / "fakes/pip/_vendor").mkdir()
        (folder / "fakes/pip/_vendor/packaging").symlink_to(Path(packaging.__file__).parent)
        self.bare = bare
        for tool in TOOLS.split():
            if path := shutil.which(tool):
                (folder / "tools" / tool).symlink_to(path)
        self.python("python3")

    def python(self, name: str, patch: str = "") -> None:
        """Put an interpreter on PATH that records its calls and runs `patch` before describing itself."""
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
        """Run setup.sh; return the interpreter that it prints."""
        result = self.run("scripts/setup.sh", level, **environment)
        assert result.returncode == 0, result.stderr
        return result.stdout

    def new_calls(self) -> list[str]:
        """Return and clear the recorded calls: "pip WHAT OPTIONS PREFIX" or "PYTHON MODULE"."""
        lines = self.calls.read_text().splitlines() if self.calls.exists() else []
        self.calls.unlink(missing_ok=True)
        return lines

    @property
    def own_python(self) -> str:
        return str(self.root / ".venv/bin/python")

    def pip_calls(self, level: str = "recipes", *, update: bool = False, cuda: bool = False) -> list[str]:
        """Return the calls that install the lock and the project into .venv; an update keeps an installed torch."""
        files = ["pip", *([] if update else ["torch-cpu"]), level, *(["cuda"] if cuda else [])]
        locked = [f"requirements/{name}.txt --require-hashes --no-deps --no-build-isolation" for name in files]
        return [f"pip {call} {self.root / '.venv'}" for call in [*locked, ". --no-deps --no-build-isolation"]]


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make an interpreter without packages."""
    prefix = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(prefix)], check=True)
    return prefix / "bin/python"


@pytest.fixture
def clone(tmp_path: Path, bare: Path) -> Clone:
    return Clone(tmp_path, bare)


@pytest.fixture
def chosen(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that makes an environment of the user's."""

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
    assert clone.new_calls() == ["python3 venv", *clone.pip_calls()]
    assert clone.setup() == clone.own_python
    assert clone.new_calls() == []


def test_the_dev_level_is_installed_once_and_includes_the_launch_level(clone: Clone) -> None:
    clone.setup("launch")
    clone.new_calls()
    clone.setup("dev")
    assert clone.new_calls() == clone.pip_calls("dev", update=True)
    clone.setup("launch")
    clone.setup("dev")
    assert clone.new_calls() == []


def test_a_changed_requirement_is_installed_into_the_same_venv(clone: Clone) -> None:
    clone.setup()
    clone.new_calls()
    for name in ("pyproject.toml", "requirements/base.txt"):
        with (clone.root / name).open("a") as file:
            file.write("# changed\n")
        clone.setup()
        clone.setup()
        assert clone.new_calls() == clone.pip_calls(update=True)


def test_the_cpu_build_is_taken_where_pip_finds_it_and_cuda_only_where_torch_asks_for_it(clone: Clone) -> None:
    asks_for = "Requires-Dist: nvidia_cublas==1.0; platform_system == 'Linux'\n"
    clone.setup(TORCH_ASKS_FOR=asks_for)
    assert clone.new_calls() == ["python3 venv", *clone.pip_calls(cuda=True)]
    (clone.root / "requirements/torch-cpu.txt").write_text(f"torch==9.9+cpu --hash=sha256:{'0' * 64}\n")
    clone.setup("dev", CPU_BUILD="1", TORCH_ASKS_FOR=asks_for)
    assert clone.new_calls() == clone.pip_calls("dev", update=True, cuda=True), "the torch that is there stays"
    shutil.rmtree(clone.root / ".venv")
    for name in ("base", "torch-cpu"):
        path = clone.root / f"requirements/{name}.txt"
        path.write_text(path.read_text().replace(f"torch=={TORCH}", "torch==9.9"))
    clone.setup(CPU_BUILD="1", TORCH_ASKS_FOR="Requires-Dist: nvidia-ml; extra == 'monitor'\n")
    assert clone.new_calls() == ["python3 venv", *clone.pip_calls()]


def test_what_a_new_lock_has_no_more_is_removed_and_nothing_else(clone: Clone) -> None:
    pin = f"once-needed==1.0 --hash=sha256:{'0' * 64}\n"
    dev = clone.root / "requirements/dev.txt"
    before = dev.read_text()
    dev.write_text(before + pin)
    clone.setup()
    dev.write_text(before)
    clone.new_calls()
    clone.setup()
    removal = f"pip uninstall -y once-needed {clone.root / '.venv'}"
    assert clone.new_calls() == [removal, *clone.pip_calls(update=True)]


def test_set_up_says_how_far_it_is_and_how_long_it_took(clone: Clone) -> None:
    result = clone.run("scripts/setup.sh")
    assert result.stdout == clone.own_python
    said = [re.sub(r"\b\d+", "N", line) for line in result.stderr.splitlines()]
    assert said[0].startswith("setup: setting up .venv with Python N.N.N (")
    assert said[1:] == [
        "setup: pip: begins, N s",
        "setup: pip: done, N s",
        "setup: torch's CPU build: begins, N s",
        "setup: torch's CPU build: not found, N s",
        "setup: packages: begins, N s",
        "setup: packages: done, N s",
        "setup: turnout: begins, N s",
        "setup: turnout: done, N s",
        "setup: ready after N s",
    ]


def test_an_unknown_level_is_refused(clone: Clone) -> None:
    result = clone.run("scripts/setup.sh", "all")
    assert (result.returncode, result.stderr) == (1, "setup: unknown level 'all'; use launch or dev")


def test_a_killed_install_is_repaired_from_scratch(clone: Clone) -> None:
    clone.setup()
    process = clone.start("scripts/setup.sh", "dev", FAKE_PIP="hang")
    deadline = time.monotonic() + 100
    while not (clone.calls.parent / "installing").exists():
        assert time.monotonic() < deadline, "pip was never called"
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    leftover = clone.root / ".venv/half-a-package"
    leftover.touch()
    clone.new_calls()
    assert clone.setup() == clone.own_python
    assert clone.new_calls() == ["python3 venv", *clone.pip_calls()]
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
    assert clone.new_calls() == ["python3 venv"] * starts_afresh + clone.pip_calls()


def test_a_venv_that_was_made_without_a_network_still_works_after_a_failed_update(clone: Clone) -> None:
    clone.setup()
    requirements = clone.root / "requirements/base.txt"
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
    assert clone.new_calls() == ["python3 venv", *clone.pip_calls()]


def test_python_too_old_is_named(clone: Clone) -> None:
    clone.python("python3", 'sys.version_info = (3, 9, 2, "final", 0)')
    clone.python("python", "sys.exit(1)")
    result = clone.run("scripts/setup.sh")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == (
        f"setup: needs Python 3.11 to 3.14, for which the lock has files; found {clone.bin}/python3 (3.9.2), "
        f"{clone.bin}/python (does not run); install one, or set TURNOUT_PYTHON to its path"
    )
    assert not (clone.root / ".venv").exists()


def test_a_later_python_on_path_is_taken_when_the_first_is_not_suitable(clone: Clone) -> None:
    clone.python("python3", 'sys.version_info = (3, 9, 2, "final", 0)')
    clone.python("python", "sys.version_info = (3, 15, 0)")  # the lock has no files for it
    clone.python("python3.12")
    clone.setup()
    assert clone.new_calls() == ["python3.12 venv", *clone.pip_calls()]


def test_progress_counts_packages_of_this_platform_and_bytes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter(range(0, 1000, 6))
    monkeypatch.setattr(install.time, "monotonic", lambda: next(clock))
    pins = {name: Pin(name, "1.0", "", ()) for name in ("absent-one", "torch", "typing-extensions", "tzdata")}
    progress = install.Progress("packages", pins)
    for line in (
        "Ignoring tzdata: markers 'sys_platform == \"win32\"' don't match your environment\n",
        "Collecting torch==1.0 (from -r requirements/base.txt (line 3))\n",
        "  Downloading torch-1.0-cp311-cp311-manylinux_2_28_x86_64.whl (526.7 MB)\n",
        "Progress 100000000 of 526700000\n",
        "",
        "Requirement already satisfied: typing_extensions==1.0 in /x (from -r requirements/base.txt (line 9))\n",
        "Processing /some/files/typing_extensions-1.0-py3-none-any.whl (from -r requirements/base.txt (line 9))\n",
        "Installing collected packages: torch, typing-extensions\n",
    ):
        progress.update(line)
    said = [line.removeprefix("setup: packages: ").rpartition(",")[0] for line in capsys.readouterr().err.splitlines()]
    assert said == [
        "begins",
        "0 of 3: pip starts",
        "1 of 3: torch==1.0",
        "1 of 3: downloading torch-1.0, 526.7 MB",
        "1 of 3: downloading torch-1.0, 100 of 527 MB",
        "1 of 3: downloading torch-1.0, 100 of 527 MB",
        "2 of 3: typing_extensions==1.0",
        "2 of 3: typing_extensions-1.0",
        "installed 0 of 3",
    ]
    assert progress.changes_something


def test_a_python_that_the_lock_has_no_files_for_is_refused(clone: Clone) -> None:
    clone.python("python3", "sys.version_info = (3, 15, 0)")
    result = clone.run("scripts/setup.sh", TURNOUT_PYTHON="python3")
    assert result.returncode == 1
    expected = f"setup: needs Python 3.11 to 3.14, for which the lock has files; found {clone.bin}/python3 (3.15.0); "
    assert result.stderr.startswith(expected)
    assert not (clone.root / ".venv").exists()


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
    assert clone.new_calls() == [f"pip .[recipes] {prefix}"]
    assert clone.setup(**environment) == python
    assert clone.new_calls() == []
    assert installed_torch(prefix) == ["torch-2.12.0+cu130.dist-info"]
    assert not (clone.root / ".venv").exists()


def test_what_a_chosen_environment_has_stays_and_nothing_newer_than_the_lock_comes_in(
    clone: Clone, chosen: Callable
) -> None:
    prefix = chosen()
    (site,) = prefix.glob("lib/python*/site-packages")
    for name, version in (("numpy", "2.99"), ("scipy", "1.0.0"), ("rich", "99.1+theirs")):
        (site / f"{name}-{version}.dist-info").mkdir()
        (site / f"{name}-{version}.dist-info/METADATA").write_text(f"Name: {name}\nVersion: {version}\n")
    clone.setup(VIRTUAL_ENV=str(prefix))
    (written,) = clone.root.glob(".cache/setup/*/constraints.txt")
    lines = written.read_text().splitlines()
    locked = closure("recipes")
    assert {"torch==2.12.0+cu130", "numpy<=2.99", "rich<=99.1", f"scipy<={locked['scipy'].version}"} < set(lines)
    assert len(lines) == len(locked)


@pytest.mark.parametrize(
    ("torch", "source"), [(None, ""), ("2.10.1", ""), ("2.12.0", "raise ImportError('libcudart')")]
)
def test_an_environment_without_a_usable_torch_is_left_alone(
    clone: Clone, chosen: Callable, torch: str | None, source: str
) -> None:
    prefix = chosen(torch=torch, source=source)
    before = sorted(prefix.rglob("[!_]*"))
    assert clone.setup(VIRTUAL_ENV=str(prefix)) == clone.own_python
    assert clone.new_calls() == ["python3 venv", *clone.pip_calls()]
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
    assert clone.new_calls() == ["mine venv", *clone.pip_calls()]
    result = clone.run("scripts/setup.sh", TURNOUT_PYTHON="old")
    assert (result.returncode, result.stderr) == (1, "setup: TURNOUT_PYTHON=old: Python 3.9.2; needs 3.11 or newer")
    result = clone.run("scripts/setup.sh", TURNOUT_PYTHON="nothing")
    assert (result.returncode, result.stderr) == (1, "setup: TURNOUT_PYTHON=nothing: no such command")


def test_a_venv_made_by_hand_is_installed_into_and_never_deleted(clone: Clone, chosen: Callable) -> None:
    prefix = chosen("my clone/.venv", torch=None)
    (prefix / "precious").touch()
    clone.setup()
    assert clone.new_calls() == clone.pip_calls()
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
    assert clone.new_calls() == ["python3 venv", *clone.pip_calls()]


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
    fake_checks(clone)
    clone.setup("dev")
    clone.new_calls()
    return clone


def fake_checks(clone: Clone) -> None:
    fakes = Path(clone.environment["PYTHONPATH"])
    (fakes / "importlinter").mkdir()
    for name, path in [("ruff", "ruff.py"), ("pyrefly", "pyrefly.py"), ("pytest", "pytest.py")]:
        (fakes / path).write_text(f"NAME = {name!r}\n{FAKE_CHECK}")
    (fakes / "importlinter/cli.py").write_text(f"NAME = 'lint-imports'\n{FAKE_CHECK}\nlint_imports_command = run\n")


def test_ci_installs_the_lock_whatever_environment_is_active(clone: Clone, chosen: Callable) -> None:
    fake_checks(clone)
    theirs = str(chosen())
    active = {"VIRTUAL_ENV": theirs, "CONDA_PREFIX": theirs, "TURNOUT_PYTHON": f"{theirs}/bin/python"}
    run = clone.run(".ci/run", **active)
    assert run.returncode == 0, run.stderr
    calls = clone.new_calls()
    installed = ["python3 venv", *clone.pip_calls("dev")]
    assert calls[: len(installed)] == installed
    assert calls[-1] == PYTEST_OF_A_PUSH
    assert all(call.startswith("pip . ") or "--require-hashes" in call for call in calls if call.startswith("pip "))


def test_every_check_runs_and_pytest_speaks_last(checks: Clone) -> None:
    run = checks.run("scripts/test.sh")
    assert run.returncode == 0
    names = ["ruff format --check .", "ruff check .", "pyrefly check", "lint-imports"]
    assert [call.split(" --python")[0] for call in checks.new_calls()] == [*names, PYTEST_OF_A_PUSH]
    lines = run.stdout.splitlines()
    assert [line.split(" ok ")[0].strip() for line in lines[:4]] == [
        "ruff format",
        "ruff check",
        "pyrefly",
        "lint-imports",
    ]
    assert lines[4:] == ["pytest speaks"]
    for which, marks in {"full": "", "fast": " -m not slow and not nightly"}.items():
        checks.run("scripts/test.sh", which)
        assert [call.split(" --python")[0] for call in checks.new_calls()] == [*names, f"{PYTEST}{marks}"]


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
    oldest, too_new = torch.split(",<")
    assert f"({oldest.replace('.', ', ')}) <= (int(number[1]), int(number[2])) < ({too_new}, 0)" in script
