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
"""Memory limits of a container, cgroup versions 2 and 1."""
_WAITING: tuple[StepPart, ...] = ("dispatch", "combine", "communication", "other")
"""Parts in which a rank waits for others, or for its device."""
_MAX_IS_WORST = ("system/process_gb", "system/gpu_peak_gb", "system/cpu_percent")
_MIN_IS_WORST = ("system/host_free_gb", "system/disk_free_gb")


class SystemStats:
    """Reads memory, CPU and disk statistics of one rank, its host and the disk of a folder."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        self._folder, self._device = folder, device
        self._process = psutil.Process()
        psutil.cpu_percent()  # the next call measures from here

    def read(self) -> dict[str, float | None]:
        """Return the statistics by key of metrics.jsonl; None if unavailable."""
        stats: dict[str, float | None] = dict.fromkeys([*_MAX_IS_WORST, *_MIN_IS_WORST])
        with contextlib.suppress(OSError, psutil.Error):
            stats["system/process_gb"] = self._process.memory_info().rss / _GB
            stats["system/host_free_gb"] = psutil.virtual_memory().available / _GB
            stats["system/cpu_percent"] = psutil.cpu_percent()
        with contextlib.suppress(OSError):
            stats["system/disk_free_gb"] = shutil.disk_usage(self._folder).free / _GB
        if self._device.type == "cuda":
            stats["system/gpu_peak_gb"] = torch.cuda.max_memory_allocated(self._device) / _GB
            torch.cuda.reset_peak_memory_stats(self._device)
        return stats


def total_memory(device: torch.device) -> int:
    """Return the total memory in bytes: of a GPU, or of the host with swap, within its container's limits."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    total = psutil.virtual_memory().total + psutil.swap_memory().total
    for path in _LIMITS:
        with contextlib.suppress(OSError, ValueError):  # no limit, or "max"
            total = min(total, int(path.read_text()))
    return total


def reduce_over_ranks(
    parts: dict[StepPart, float], stats: dict[str, float | None], group: Group
) -> dict[str, float | None]:
    """Return the `time/` and `system/` keys of metrics.jsonl on the first rank, nothing on the others. Collective.

    `group` is one of hosts, so that nothing waits for a GPU.

    Times, the seconds of each part of a rank's mean step, are averaged over ranks, with the maximum as `time_max/` if
    there are several ranks; of the statistics the worst value over ranks is taken.
    """
    mine = [*parts.values(), *(float("nan") if value is None else value for value in stats.values())]
    table = group.gather(torch.tensor(mine, dtype=torch.float64))  # (ranks, values)
    if table is None:
        return {}
    times, rest = table.split([len(PARTS), len(stats)], dim=1)
    record: dict[str, float | None] = _named("time", times.mean(0))
    if group.size > 1:
        record |= _named("time_max", times.amax(0)) | _slowest(times)
    for key, values in zip(stats, rest.T, strict=True):
        present = values[~values.isnan()].tolist()
        record[key] = None if not present else min(present) if key in _MIN_IS_WORST else max(present)
    return record


def _slowest(times: Tensor) -> dict[str, float | None]:
    """Return the rank with the longest own time, without waiting for others, and that over the median rank's.

    `times` (ranks, parts) are of a mean step. Of an even number of ranks the lower median is taken: of 2 the faster.
    """
    own = times[:, [part not in _WAITING for part in PARTS]].sum(1)
    rank = int(own.argmax())
    return {"slowest_rank": rank, "slowest_rank_ratio": float(own[rank] / own.median().clamp(min=1e-9))}


def _named(prefix: str, seconds: Tensor) -> dict[str, float | None]:
    return {f"{prefix}/{part}": s for part, s in zip(PARTS, seconds.tolist(), strict=True)}
