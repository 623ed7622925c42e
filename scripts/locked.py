"""Read the lock, requirements/*.txt, and the digest of its inputs. Needs only the standard library."""

import hashlib
import json
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "requirements"

PINS = ("pip", "torch-cpu", "base", "triton", "cuda", "recipes", "dev", "docs", "uv")
"""Files of the lock, described in scripts/lock.py."""


@dataclass(frozen=True, slots=True)
class Pin:
    """One package of the lock."""

    name: str
    """Normalised: lower case, hyphens."""
    version: str
    marker: str
    """Environment marker, in pip's syntax; empty: needed everywhere."""
    hashes: tuple[str, ...]
    """SHA-256, in hexadecimal, of every file that may be installed."""


def read(name: str) -> dict[str, Pin]:
    """Return the packages of one file of the lock, without those of included files."""
    return {pin.name: pin for pin in parse((FOLDER / f"{name}.txt").read_text())}


def closure(name: str) -> dict[str, Pin]:
    """Return the packages of one file and of the files that it includes (`-r FILE`)."""
    text = (FOLDER / f"{name}.txt").read_text()
    pins = {}
    for included in re.findall(r"^-r (\S+)\.txt$", text, re.MULTILINE):
        pins |= closure(included)
    return pins | {pin.name: pin for pin in parse(text)}


def parse(text: str) -> Iterator[Pin]:
    """Read requirements as uv writes them.

    Raises:
        ValueError: if a line is not a pin.
    """
    lines = [
        line for line in text.replace("\\\n", " ").splitlines() if line and not line.lstrip().startswith(("#", "-r "))
    ]
    for line in lines:
        match = re.fullmatch(r"([\w.-]+)==([^\s;]+)(?: ; (.*?))?((?:\s+--hash=sha256:[0-9a-f]{64})*)\s*", line)
        if match is None:
            raise ValueError(f"not a package with its version and hashes: {line}")
        name, version, marker, hashes = match.groups()
        yield Pin(normalised(name), version, marker or "", tuple(re.findall(r"sha256:([0-9a-f]{64})", hashes)))


def normalised(name: str) -> str:
    """Return a package name in the form in which registries compare names."""
    return re.sub(r"[-_.]+", "-", name).lower()


def digest() -> str:
    """Return a hash of the lock's inputs: the requirements of pyproject.toml, and constraints.txt."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = [project["build-system"]["requires"]]
    wanted += [project["project"][key] for key in ("requires-python", "dependencies", "optional-dependencies")]
    lines = [line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    return hashlib.sha256(json.dumps([wanted, [line for line in lines if line]]).encode()).hexdigest()


def recorded_digest() -> str:
    """Return the digest recorded in the lock."""
    match = re.search(r"^# inputs: ([0-9a-f]{64})$", (FOLDER / "base.txt").read_text(), re.MULTILINE)
    return match[1] if match else ""
