"""System statistics of a rank and its host, and their reduction over ranks."""

import contextlib
import shutil
from pathlib import Path

import psutil
import torch
from torch import Tensor

from trainer.distributed.collectives import Group
from trainer.step_timer import PARTS, StepPart

_GB = 1e9
_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""Memory limits of a container, in versions 2 and 1 of control groups."""
_LARGEST = ("system/process_gb", "system/gpu_peak_gb", "system/cpu_percent")
_SMALLEST = ("system/host_free_gb", "system/disk_free_gb")


class Machine:
    """Looks at one rank's process, device, host and disk."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        """Begin to look.

        Args:
            folder: on the disk that matters.
            device: of the rank.
        """
        self._folder, self._device = folder, device
        self._process = psutil.Process()
        psutil.cpu_percent()  # it counts from the last time it was asked

    def read(self) -> dict[str, float | None]:
        """Return what there is to see, by the keys of metrics.jsonl; None is not known here."""
        found: dict[str, float | None] = dict.fromkeys([*_LARGEST, *_SMALLEST])
        with contextlib.suppress(OSError, psutil.Error):
            found["system/process_gb"] = self._process.memory_info().rss / _GB
            found["system/host_free_gb"] = psutil.virtual_memory().available / _GB
            found["system/cpu_percent"] = psutil.cpu_percent()
        with contextlib.suppress(OSError):
            found["system/disk_free_gb"] = shutil.disk_usage(self._folder).free / _GB
        if self._device.type == "cuda":
            found["system/gpu_peak_gb"] = torch.cuda.max_memory_allocated(self._device) / _GB
            torch.cuda.reset_peak_memory_stats(self._device)
        return found


def total_memory(device: torch.device) -> int:
    """Return the bytes that there are for all processes: of a GPU, or of the host, its swap space and its limits."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    total = psutil.virtual_memory().total + psutil.swap_memory().total
    for path in _LIMITS:
        with contextlib.suppress(OSError, ValueError):  # no such limit, or "max"
            total = min(total, int(path.read_text()))
    return total


def over_ranks(parts: dict[StepPart, float], machine: dict[str, float | None], group: Group) -> dict[str, float | None]:
    """Return the `time/` and `system/` keys of metrics.jsonl, in one exchange; every rank must call it.

    Args:
        parts: seconds of this rank's mean step.
        machine: what this rank sees.
        group: all ranks. Of times their mean counts, and with several of them the largest (`time_max/`) as well; of the
            rest the worst.
    """
    mine = [*parts.values(), *(float("nan") if value is None else value for value in machine.values())]
    table = group.all_gather(torch.tensor(mine, dtype=torch.float64, device=group.device))  # (ranks, values)
    times, rest = table.cpu().split([len(PARTS), len(machine)], dim=1)
    record: dict[str, float | None] = _named("time", times.mean(0))
    if group.size > 1:
        record |= _named("time_max", times.amax(0))
    for key, values in zip(machine, rest.T, strict=True):
        known = values[~values.isnan()].tolist()
        record[key] = None if not known else min(known) if key in _SMALLEST else max(known)
    return record


def _named(prefix: str, seconds: Tensor) -> dict[str, float | None]:
    return {f"{prefix}/{part}": s for part, s in zip(PARTS, seconds.tolist(), strict=True)}
