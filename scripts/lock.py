"""Renew the lock, requirements/*.txt: every package with its version and the hashes of its files.

    python -m scripts.lock           the newest of everything inside pyproject.toml's bounds
    python -m scripts.lock --keep    only changes that pyproject.toml or constraints.txt make necessary

Runs on any Python that pyproject.toml allows, with nothing installed: uv, which resolves, is locked too and comes into
.cache/lock. Afterwards run `scripts/test.sh` and commit requirements/. The files:

    pip.txt           the installer and the build backend, installed first
    torch-cpu.txt     the CPU build of the same torch, used where pip finds it, as in CI
    base.txt          the base dependencies, with torch as the registry has it
    triton.txt        the extra `triton`, which that torch needs where it is built for CUDA, and the extra `dev` always
    cuda.txt          additional dependencies of that torch where it is built for CUDA
    recipes.txt       the extra `recipes`: whatever the project's own configs use
    dev.txt           the extra `dev`: tests and checks, with lm-eval and TensorBoard
    docs.txt          the extra `docs`
    uv.txt            uv, for the next renewal

Each package has one version for all Pythons and platforms, with the hashes of all its files on the registry. CPU builds
of torch are not there: their hashes are those of the wheels in pip's find-links folders.
"""

import argparse
import hashlib
import os
import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

from scripts.locked import FOLDER, PINS, ROOT, digest, normalised, parse

CACHE = ROOT / ".cache/lock"
PROJECT = "pyproject.toml"
PURPOSE = {
    "pip": "The installer and the build backend.",
    "torch-cpu": "Torch's CPU build.",
    "base": "The base dependencies.",
    "triton": "Packages that the extra triton adds.",
    "cuda": "Additional dependencies of torch's CUDA build.",
    "recipes": "Packages that the extra recipes adds.",
    "dev": "Packages that the extra dev adds.",
    "docs": "Packages that the extra docs adds.",
    "uv": "The tool that renews the lock.",
}
INCLUDES = {"base": ["pip"], "cuda": ["triton"], "recipes": ["base"], "dev": ["recipes", "triton"], "docs": ["dev"]}
OF_CUDA = re.compile(r"(nvidia|cuda)-.*")


def main() -> None:
    """Resolve, distribute the packages over the files, and print what changed."""
    parser = argparse.ArgumentParser(description="Renew requirements/*.txt, the lock.")
    parser.add_argument("--keep", action="store_true", help="keep the versions that still fit")
    keep = parser.parse_args().keep
    before = _locked()
    uv = _uv()
    backend = tomllib.loads((ROOT / PROJECT).read_text())["build-system"]["requires"]
    solution = _resolve(uv, [PROJECT, "--all-extras"], ["pip", "uv", *backend], before if keep else {})
    wanted = {"uv": ([], ["uv"]), "pip": ([], ["pip", *backend]), "base": ([PROJECT], [])}
    wanted |= {extra: ([PROJECT, "--extra", extra], []) for extra in ("recipes", "dev", "docs")}
    files: dict[str, set[str]] = {}
    for name, (options, packages) in wanted.items():
        in_other_files = set().union(*files.values())
        files[name] = set(_resolve(uv, options, packages, solution)) - in_other_files
    files["cuda"] = {package for package in files["base"] if OF_CUDA.fullmatch(package)}
    files["triton"] = files["base"] & {"triton"}
    files["base"] -= files["cuda"] | files["triton"]
    assert set().union(*files.values()) == set(solution), "every package of the solution is in a file"
    for name, members in files.items():
        _write(name, [solution[package] for package in sorted(members)])
    _write("torch-cpu", _cpu_build(next(parse(solution["torch"])).version))
    _report(before, _locked())


def _uv() -> Path:
    if not (CACHE / "bin/uv").exists():
        venv.create(CACHE, with_pip=True, clear=True)
    pip = [CACHE / "bin/python", "-m", "pip", "install", "--quiet", "--require-hashes"]
    subprocess.run([*pip, "-r", FOLDER / "uv.txt"], check=True)
    return CACHE / "bin/uv"


def _resolve(uv: Path, options: list[str], packages: list[str], preferred: dict[str, str]) -> dict[str, str]:
    """Return the text of each package in uv's solution.

    Args:
        uv: the program.
        options: the project and its extras, or nothing.
        packages: further requirements.
        preferred: a solution whose versions are kept where they fit.
    """
    project = tomllib.loads((ROOT / PROJECT).read_text())["project"]
    source, solution = CACHE / "asked.in", CACHE / "solution.txt"
    source.write_text("".join(f"{package}\n" for package in packages))
    solution.write_text("".join(preferred.values()))
    command = [uv, "pip", "compile", "--quiet", "--no-header", "--no-annotate", "--universal", "--generate-hashes"]
    command += [source, *options, "--constraint", "constraints.txt", "--output-file", solution]
    command += ["--python-version", project["requires-python"].removeprefix(">="), "--fork-strategy", "fewest"]
    subprocess.run(command, cwd=ROOT, check=True)
    return _blocks(solution.read_text())


def _blocks(text: str) -> dict[str, str]:
    """Return the lines of each package: its pin and its hashes."""
    blocks = re.findall(r"^[A-Za-z0-9].*\n(?:[ \t]+--hash.*\n)*", text, re.MULTILINE)
    return {normalised(re.split(r"[=\s]", block, maxsplit=1)[0]): block for block in blocks}


def _write(name: str, blocks: list[str]) -> None:
    lines = [f"# {PURPOSE[name]} Written by scripts/lock.py, not by hand.", f"# inputs: {digest()}"]
    lines += [f"-r {other}.txt" for other in INCLUDES.get(name, [])]
    (FOLDER / f"{name}.txt").write_text("\n".join(lines) + "\n" + "".join(blocks))


def _cpu_build(version: str) -> list[str]:
    """Return the pin of torch's CPU build, with the hashes of this machine's wheels and of those already locked."""
    found = subprocess.run([sys.executable, "-m", "pip", "config", "get", "global.find-links"], capture_output=True)
    folders = {*found.stdout.decode().split(), *os.environ.get("PIP_FIND_LINKS", "").split()}
    wheels = {path for folder in folders for path in Path(folder).glob(f"torch-{version}+cpu-*.whl")}
    hashes = {hashlib.sha256(path.read_bytes()).hexdigest() for path in wheels}
    hashes |= {value for pin in parse(_text("torch-cpu")) if pin.version == f"{version}+cpu" for value in pin.hashes}
    lines = [f"torch=={version}+cpu", *(f"    --hash=sha256:{value}" for value in sorted(hashes))]
    return [" \\\n".join(lines) + "\n"] if hashes else []


def _text(name: str) -> str:
    path = FOLDER / f"{name}.txt"
    return path.read_text() if path.exists() else ""


def _locked() -> dict[str, str]:
    """Return the text of each package in the lock."""
    return {package: block for name in PINS if name != "torch-cpu" for package, block in _blocks(_text(name)).items()}


def _report(before: dict[str, str], after: dict[str, str]) -> None:
    def versions(blocks: dict[str, str]) -> dict[str, str]:
        return {pin.name: pin.version for pin in parse("".join(blocks.values()))}

    old, new = versions(before), versions(after)
    changed = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    for name in changed:
        print(f"{name:32} {old.get(name, '-'):>16} -> {new.get(name, '-')}")
    print(f"{len(new)} packages, {len(changed)} of them changed")


if __name__ == "__main__":
    main()
