"""Install the lock into the environment of the running Python, with progress on stderr.

    python -m scripts.install LEVEL OWNER STATE      called by scripts/setup.sh

LEVEL is launch or dev. OWNER is `setup` for the project's own .venv, which gets exactly the lock: its versions, checked
by hash, built without downloading a build backend. It is `user` for an environment of the user's: packages that fit
stay as they are, torch always does; missing ones come in versions no newer than the lock's. STATE is a folder for pip's
log; it contains a file `unfinished` while pip changes the environment.
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
PROGRESS_EVERY_S = 5.0


def main() -> int:
    """Install, and return pip's exit code."""
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
        # A step of its own: together with the other packages pip would prefer torch's file on the registry, whose hash
        # it knows in advance. Where pip finds no CPU build, torch is installed with the other packages.
        failed = _pip(state, "torch's CPU build", [*locked, "requirements/torch-cpu.txt"], cpu)
        code = failed if (state / "unfinished").exists() else 0
    code = code or _pip(state, "packages", [*locked, f"requirements/{name}.txt"], closure(name))
    if code == 0 and _torch_asks_for(read("cuda")):
        code = _pip(state, "CUDA", [*locked, "requirements/cuda.txt"], read("cuda"))
    return code or _pip(state, "turnout", ["install", "--no-deps", "--no-build-isolation", "-e", "."], {})


def _add_to(state: Path, pins: dict[str, Pin], project: str) -> int:
    """Install the project and its missing dependencies into the user's environment."""
    ceilings = state / "constraints.txt"
    ceilings.write_text("\n".join(_ceilings(pins)) + "\n")
    backend = ["--build-constraint", str(ceilings)] if _pip_major() >= 26 else []
    return _pip(
        state, "turnout and its missing dependencies", ["install", "-e", project, "-c", str(ceilings), *backend], {}
    )


def _pip(state: Path, title: str, arguments: list[str], pins: dict[str, Pin]) -> int:
    """Run pip with its output in the log and progress on stderr; return its exit code."""
    unfinished = state / "unfinished"
    unfinished.touch()
    progress = Progress(title, pins)
    bars = ["--progress-bar", "raw"] if arguments[0] == "install" and _pip_major() >= 25 else []  # reports bytes
    command = [sys.executable, "-m", "pip", *arguments, *bars]
    with (
        (state / "log").open("a") as log,
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process,
    ):
        assert process.stdout is not None, "stdout is a pipe"
        for line in _lines(process.stdout):
            if not line.startswith("Progress "):
                log.write(line)
                log.flush()
            progress.update(line)
        code = process.wait()
    importlib.invalidate_caches()
    if code == 0 or not progress.changes_something:
        unfinished.unlink(missing_ok=True)
    progress.show("done" if code == 0 else "not found" if progress.is_not_found else "failed")
    return code


def _version(package: str) -> str:
    """Return the version of a package, "0" if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "0"


def _pip_major() -> int:
    return int(_version("pip").partition(".")[0])


def _lines(stream: IO[str]) -> Iterator[str]:
    """Yield lines as they arrive, and an empty string after each second without one."""
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
    """Progress as whole lines, one every few seconds, readable on a terminal and in a log."""

    def __init__(self, title: str, pins: dict[str, Pin]) -> None:
        """Show the first line.

        Args:
            title: name of the step.
            pins: packages that the step installs.
        """
        self.changes_something = False
        """Whether pip has begun to change the environment."""
        self.is_not_found = False
        """Whether pip found no matching file."""
        self._title, self._pins = title, pins
        self._found: set[str] = set()
        self._ignored: set[str] = set()
        self._doing = "pip starts"
        self._started = self._shown = time.monotonic()
        self.show("begins")

    def update(self, line: str) -> None:
        """Parse a line of pip's output; show progress if it is time."""
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
            self.is_not_found = True
        if time.monotonic() - self._shown >= PROGRESS_EVERY_S:
            total = len(self._pins.keys() - self._ignored)
            if self.changes_something and self._pins:
                self.show(f"installed {self._installed()} of {total}")
            elif self._pins:
                self.show(f"{len(self._found & self._pins.keys())} of {total}: {self._doing}")
            else:
                self.show(self._doing)

    def show(self, text: str) -> None:
        """Print a line."""
        self._shown = time.monotonic()
        print(f"setup: {self._title}: {text}, {self._shown - self._started:.0f} s", file=sys.stderr, flush=True)

    def _installed(self) -> int:
        importlib.invalidate_caches()
        installed = {normalised(str(found.metadata["Name"])): found.version for found in metadata.distributions()}
        return sum(installed.get(pin.name, "").partition("+")[0] == pin.version for pin in self._pins.values())


def _short(file: str) -> str:
    """Shorten the path of a file, or a requirement, to package and version."""
    return re.sub(r"(-\d[^-]*)-.*\.whl$", r"\1", file.rpartition("/")[2])


def _torch_asks_for(pins: dict[str, Pin]) -> bool:
    """Return whether the installed torch requires any of these packages."""
    required = metadata.requires("torch") or []
    return any(normalised(re.split(r"[^A-Za-z0-9._-]", line, maxsplit=1)[0]) in pins for line in required)


def _remove_dropped(state: Path) -> int:
    """Uninstall packages that only an earlier lock had; return pip's exit code."""
    names = state / "names"
    dropped = set(names.read_text().split()) if names.exists() else set()
    dropped -= {package for part in PINS for package in read(part)}
    if not dropped:
        return 0
    return _pip(state, "packages that the lock has dropped", ["uninstall", "-y", *sorted(dropped)], {})


def _ceilings(pins: dict[str, Pin]) -> Iterator[str]:
    """Yield a constraint per package: torch as installed; others no newer than both installed and locked version."""
    from pip._vendor.packaging.version import Version  # the only copy before the project is installed

    for pin in pins.values():
        installed = _version(pin.name)
        if pin.name == "torch":
            yield f"torch=={installed}"
        else:
            ceiling = max(Version(pin.version), Version(Version(installed).public))
            yield f"{pin.name}<={ceiling}" + (f" ; {pin.marker}" if pin.marker else "")


if __name__ == "__main__":
    sys.exit(main())
