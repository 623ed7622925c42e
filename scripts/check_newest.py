"""Run the tests with the newest versions that pyproject.toml allows, independently of the lock.

    python -m scripts.check_newest                       all checks and tests
    python -m scripts.check_newest tests/unit -q         only pytest, with these arguments
    python -m scripts.check_newest --torch 2.13.0 ...    with this torch; the newest is a download of several GB

It makes an environment in .cache/newest, runs scripts/test.sh there, and prints a table of packages that are newer than
in the lock or have a newer version outside the bounds. The exit code is that of the tests. It runs once a week
(.github/workflows/newest.yml); if it fails, a bound or the code must change before the lock is renewed.
"""

import argparse
import json
import os
import subprocess
import venv
from pathlib import Path

from scripts.locked import PINS, ROOT, normalised, read

FOLDER = ROOT / ".cache/newest"
PYTHON = FOLDER / "bin/python"


def main() -> int:
    """Run scripts/test.sh in a fresh environment; return its exit code."""
    parser = argparse.ArgumentParser(description="Try the newest of everything that pyproject.toml allows.")
    parser.add_argument("--torch", help="use this version of torch")
    arguments, pytest_arguments = parser.parse_known_args()
    venv.create(FOLDER, with_pip=True, clear=True)
    held = [f"torch=={arguments.torch}"] if arguments.torch else []
    for what in (["--upgrade", "pip"], ["--editable", f"{ROOT}[dev]", *held]):
        subprocess.run([PYTHON, "-m", "pip", "install", *what], check=True)
    there = {normalised(found["name"]): found["version"] for found in _list()}
    outside = {normalised(found["name"]): found["latest_version"] for found in _list("--outdated")}
    variables = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "CONDA_PREFIX")}
    variables["TURNOUT_PYTHON"] = str(PYTHON)
    code = subprocess.run([ROOT / "scripts/test.sh", *pytest_arguments], env=variables).returncode
    lines = table(there, outside)
    lines.append(f"The checks {'pass' if code == 0 else f'fail ({code})'} with the newest of everything.")
    print("\n".join(lines))
    if summary := os.environ.get("GITHUB_STEP_SUMMARY"):
        with Path(summary).open("a") as file:
            file.write("\n".join(lines) + "\n")
    return code


def table(there: dict[str, str], outside: dict[str, str]) -> list[str]:
    """Return the lines of a table of packages that differ from the lock.

    Args:
        there: installed version of each package.
        outside: later versions, excluded by a bound of this project or of another package.
    """
    locked = {pin.name: pin.version for part in PINS if part != "torch-cpu" for pin in read(part).values()}
    rows = [("package", "lock", "newest inside the bounds", "newest"), ("---", "---", "---", "---")]
    for name, version in sorted(there.items()):
        before = locked.get(name, "-")
        if name != "turnout" and (version.partition("+")[0] != before or name in outside):
            rows.append((name, before, version, outside.get(name, "")))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows] + [""]


def _list(*options: str) -> list[dict[str, str]]:
    command = [PYTHON, "-m", "pip", "list", "--format", "json", *options]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


if __name__ == "__main__":
    raise SystemExit(main())
