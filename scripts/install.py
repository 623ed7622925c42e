"""Install the lock into the environment of the Python that runs this, and say on stderr how far it is.

    python -m scripts.install LEVEL OWNER STATE      called by scripts/setup.sh

LEVEL is launch or dev. OWNER is `setup` for the project's own .venv, which gets the lock: exactly these versions, from
files with these hashes, built without downloading a build backend. It is `user` for an environment that somebody chose:
what fits there stays as it is, torch above all, and of what is missing or does not fit nothing newer than the lock's
version comes in. STATE is a folder for pip's log; a file `unfinished` is in it while pip changes the environment.
"""

import importlib
import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import IO

from scripts.locked import PINS, ROOT, Pin, closure, normalised, read

LEVELS = {"launch": ("recipes", ".[recipes]"), "dev": ("dev", ".[dev]")}
SPEAKS_EVERY_S = 5.0


def main() -> int:
    """Return pip's exit code."""
    level, owner, state = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    name, project = LEVELS[level]
    (state / "log").write_text("")
    if owner == "user":
        return _add_to(state, closure(name), project)
    code = _install_lock(state, name)
    if code == 0:
        (state / "names").write_text("".join(f"{package}\n" for part in PINS for package in read(part)))
    return code


def _install_lock(state: Path, name: str) -> int:
    locked = ["install", "--require-hashes", "--no-deps", "--no-build-isolation", "-r"]
    code = _remove_dropped(state) or _pip(state, "pip", [*locked, "requirements/pip.txt"], read("pip"))
    if (
        code == 0
        and (cpu := read("torch-cpu"))
        and _version("torch").partition("+")[0] != read("base")["torch"].version
    ):
        # Where pip finds no such file, torch comes with the other packages. Among those it would not choose this build:
        # it prefers files whose hashes the registry tells beforehand.
        failed = _pip(state, "torch's CPU build", [*locked, "requirements/torch-cpu.txt"], cpu)
        code = failed if (state / "unfinished").exists() else 0
    code = code or _pip(state, "packages", [*locked, f"requirements/{name}.txt"], closure(name))
    if code == 0 and _torch_asks_for(read("cuda")):
        code = _pip(state, "CUDA", [*locked, "requirements/cuda.txt"], read("cuda"))
    return code or _pip(state, "turnout", ["install", "--no-deps", "--no-build-isolation", "-e", "."], {})


def _add_to(state: Path, pins: dict[str, Pin], project: str) -> int:
    """Install the project and what it lacks into somebody's environment."""
    ceilings = state / "constraints.txt"
    ceilings.write_text("\n".join(_ceilings(pins)) + "\n")
    backend = ["--build-constraint", str(ceilings)] if _pip_major() >= 26 else []
    return _pip(state, "turnout and what it lacks", ["install", "-e", project, "-c", str(ceilings), *backend], {})


def _pip(state: Path, title: str, arguments: list[str], pins: dict[str, Pin]) -> int:
    """Run pip, write what it says into the log, and say how far it is; return its exit code."""
    unfinished = state / "unfinished"
    unfinished.touch()
    progress = Progress(title, pins)
    bars = ["--progress-bar", "raw"] if arguments[0] == "install" and _pip_major() >= 25 else []  # counts bytes
    command = [sys.executable, "-m", "pip", *arguments, *bars]
    with (
        (state / "log").open("a") as log,
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process,
    ):
        assert process.stdout is not None, "it is a pipe"
        for line in _lines(process.stdout):
            if not line.startswith("Progress "):
                log.write(line)
                log.flush()
            progress.hear(line)
        code = process.wait()
    importlib.invalidate_caches()
    if code == 0 or not progress.changes_something:
        unfinished.unlink(missing_ok=True)
    progress.say("done" if code == 0 else "not found" if progress.finds_nothing else "failed")
    return code


def _version(package: str) -> str:
    """Return the version of an installed package; 0 without one."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "0"


def _pip_major() -> int:
    return int(_version("pip").partition(".")[0])


def _lines(stream: IO[str]) -> Iterator[str]:
    """Yield lines as they come, and an empty string for every second without one."""
    lines: queue.Queue[str | None] = queue.Queue()

    def read_all() -> None:
        for line in stream:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read_all, daemon=True).start()
    while True:
        try:
            line = lines.get(timeout=1)
        except queue.Empty:
            line = ""
        if line is None:
            return
        yield line


class Progress:
    """Whole lines, one in a few seconds, so that a terminal and a log show the same."""

    def __init__(self, title: str, pins: dict[str, Pin]) -> None:
        """Begin with a line.

        Args:
            title: of the step.
            pins: the packages that it installs.
        """
        self.changes_something = False
        """pip has begun to change the environment."""
        self.finds_nothing = False
        """pip knows no such file."""
        self._title, self._pins = title, pins
        self._found: set[str] = set()
        self._ignored: set[str] = set()
        self._doing = "pip starts"
        self._started = self._spoke = time.monotonic()
        self.say("begins")

    def hear(self, line: str) -> None:
        """Take a line of pip's, and speak if it is time."""
        if match := re.match(r"Ignoring ([^:\s]+)", line):  # of another platform or Python
            self._ignored.add(normalised(match[1]))
        elif match := re.match(r"\s*(?:Collecting|Processing|Obtaining|Requirement already satisfied:) (\S+)", line):
            self._doing = _short(match[1])
            self._found.add(normalised(re.split(r"==|-\d", self._doing, maxsplit=1)[0]))
        elif match := re.match(r"\s+Downloading (\S+)(?: \((.*)\))?", line):
            self._doing = f"downloading {_short(match[1])}, {match[2] or ''}"
        elif match := re.match(r"Progress (\d+) of (\d+)", line):
            done, size = (int(number) / 1e6 for number in match.groups())
            self._doing = re.sub(r", [^,]*$", "", self._doing) + f", {done:.0f} of {size:.0f} MB"
        elif line.startswith("Building wheel"):
            self._doing = line.strip().partition(":")[0].lower()
        elif line.startswith(("Installing collected packages", "Attempting uninstall", "Found existing installation")):
            self.changes_something = True
        elif line.startswith("ERROR: No matching distribution"):
            self.finds_nothing = True
        if time.monotonic() - self._spoke >= SPEAKS_EVERY_S:
            total = len(self._pins.keys() - self._ignored)
            if self.changes_something and self._pins:
                self.say(f"installed {self._installed()} of {total}")
            elif self._pins:
                self.say(f"{len(self._found & self._pins.keys())} of {total}: {self._doing}")
            else:
                self.say(self._doing)

    def say(self, what: str) -> None:
        """Print a line."""
        self._spoke = time.monotonic()
        print(f"setup: {self._title}: {what}, {self._spoke - self._started:.0f} s", file=sys.stderr, flush=True)

    def _installed(self) -> int:
        importlib.invalidate_caches()
        there = {normalised(str(found.metadata["Name"])): found.version for found in metadata.distributions()}
        return sum(there.get(pin.name, "").partition("+")[0] == pin.version for pin in self._pins.values())


def _short(file: str) -> str:
    """Return package and version of a file's path or of a requirement."""
    return re.sub(r"(-\d[^-]*)-.*\.whl$", r"\1", file.rpartition("/")[2])


def _torch_asks_for(pins: dict[str, Pin]) -> bool:
    """Tell whether the torch that is installed requires any of these packages."""
    required = metadata.requires("torch") or []
    return any(normalised(re.split(r"[^A-Za-z0-9._-]", line, maxsplit=1)[0]) in pins for line in required)


def _remove_dropped(state: Path) -> int:
    """Uninstall what an earlier lock brought and this one has not; return pip's exit code."""
    names = state / "names"
    dropped = set(names.read_text().split()) if names.exists() else set()
    dropped -= {package for part in PINS for package in read(part)}
    if not dropped:
        return 0
    return _pip(state, "what the lock has no more", ["uninstall", "-y", *sorted(dropped)], {})


def _ceilings(pins: dict[str, Pin]) -> Iterator[str]:
    """Yield a constraint for each package: torch as it is there, others no newer than there or than in the lock."""
    from pip._vendor.packaging.version import Version  # there is no other before the project is installed

    for pin in pins.values():
        installed = _version(pin.name)
        if pin.name == "torch":
            yield f"torch=={installed}"
        else:
            ceiling = max(Version(pin.version), Version(Version(installed).public))
            yield f"{pin.name}<={ceiling}" + (f" ; {pin.marker}" if pin.marker else "")


if __name__ == "__main__":
    sys.exit(main())
