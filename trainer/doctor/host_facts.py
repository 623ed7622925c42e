"""Facts about the machine and the start of the ranks, for checks. Imports no torch."""

import os
import resource
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from trainer.environment import local_size_and_rank, world_size_and_rank

_SHARED_MEMORY = Path("/dev/shm")
_DRIVER = Path("/proc/driver/nvidia/version")
_INFINIBAND = Path("/sys/class/infiniband")
_MOUNTS = Path("/proc/self/mountinfo")
_ESCAPES = {"\\040": " ", "\\011": "\t", "\\012": "\n", "\\134": "\\"}
"""Characters that mountinfo writes in octal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostFacts:
    """A machine; None where a value is unknown or unlimited."""

    environment: Mapping[str, str] = field(default_factory=dict)
    cores: int = 64
    """Cores that this process may use."""
    world_size: int = 1
    ranks_here: int = 1
    """Ranks on this machine."""
    has_gpu: bool = False
    has_infiniband: bool = False
    shared_memory_bytes: int | None = None
    open_files: int | None = None
    """Soft limit."""
    locked_bytes: int | None = None
    """Soft limit of memory that may not be moved, which RDMA needs."""
    file_system: str | None = None
    """Type of the file system of `runs_dir`, as mounts name it."""
    free_bytes: int | None = None
    """On it."""

    @property
    def num_nodes(self) -> int:
        """Machines."""
        return -(-self.world_size // max(1, self.ranks_here))

    def number(self, name: str) -> int | None:
        """Return the number that an environment variable has; None if it has none."""
        text = self.environment.get(name, "").strip()
        return int(text) if text.isascii() and text.isdigit() and len(text) < 10 else None


def read_host(
    runs_dir: Path,
    environment: Mapping[str, str],
    *,
    world_size: int | None = None,
    ranks_here: int | None = None,
    mounts: Path = _MOUNTS,
) -> HostFacts:
    """Read the facts of this machine, for a run in `runs_dir`; ranks are those of the launcher if none are given."""
    started, _ = world_size_and_rank()
    world_size = world_size or started
    folder = _existing(runs_dir)
    has_devices = _INFINIBAND.is_dir() and any(_INFINIBAND.iterdir())
    return HostFacts(
        environment=environment,
        cores=len(os.sched_getaffinity(0)),
        world_size=world_size,
        ranks_here=ranks_here or local_size_and_rank()[0] or world_size,
        has_gpu=_DRIVER.exists(),
        has_infiniband=has_devices,
        shared_memory_bytes=_total(_SHARED_MEMORY),
        open_files=_soft_limit(resource.RLIMIT_NOFILE),
        locked_bytes=_soft_limit(resource.RLIMIT_MEMLOCK),
        file_system=_file_system(folder, mounts),
        free_bytes=shutil.disk_usage(folder).free,
    )


def _existing(path: Path) -> Path:
    """Return the path, or the nearest folder above it that exists."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())


def _total(path: Path) -> int | None:
    with suppress(OSError):
        return shutil.disk_usage(path).total
    return None


def _soft_limit(kind: int) -> int | None:
    soft, _ = resource.getrlimit(kind)
    return None if soft == resource.RLIM_INFINITY else soft


def _file_system(path: Path, mounts: Path) -> str | None:
    """Return the type of the file system that a path is on: of the mount that is longest in its path."""
    try:
        lines = mounts.read_text().splitlines()
        path = path.resolve()
    except OSError:
        return None
    found: list[tuple[int, str]] = []
    for line in lines:
        before, _, after = line.partition(" - ")
        fields, kinds = before.split(), after.split()
        if len(fields) < 5 or not kinds:
            continue
        point = Path(_unescaped(fields[4]))
        if point == path or point in path.parents:
            found.append((len(point.parts), kinds[0]))
    return max(found, key=lambda pair: pair[0], default=(0, None))[1]


def _unescaped(text: str) -> str:
    for escape, character in _ESCAPES.items():
        text = text.replace(escape, character)
    return text
