"""The process a run lives in: device, memory allocator, compiler, versions.

It reads CXX of the environment; `trainer/environment.py` has what says how a process was started.
"""

import ctypes
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from trainer.distributed.version import turnout_version
from trainer.environment import local_size_and_rank
from trainer.errors import ConfigError

_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1  # glibc's names for mallopt
_KEEP_BELOW_BYTES = 1 << 30


def start(device: str) -> torch.device:
    """Prepare the process and return the device that `parallel.device` names.

    Raises:
        ConfigError: if a GPU is asked for and there is none, or this machine has fewer than ranks.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("parallel.device: cuda, but torch sees no GPU here; use auto or cpu")
    keep_freed_memory()
    if device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    num_here, local_rank = local_size_and_rank()
    num_ranks = max(num_here or 1, local_rank + 1)
    num_gpus = torch.cuda.device_count()
    if num_ranks > num_gpus:  # on every rank of the machine, not only on those without a GPU
        raise ConfigError(
            f"parallel.device: {num_ranks} ranks on this machine, but torch sees {num_gpus} GPU{'s' * (num_gpus > 1)}; "
            f"start at most {num_gpus} here (NPROC, --nproc-per-node), or use parallel.device=cpu"
        )
    chosen = torch.device("cuda", local_rank)
    torch.cuda.set_device(chosen)  # what torch.distributed means by "the" GPU of this process
    return chosen


def keep_freed_memory() -> bool:
    """Ask glibc to keep freed blocks of up to 1 GiB instead of handing each back to the system.

    Activations are freed and asked for again every step; by default every large one is a new mapping whose pages are
    faulted in and zeroed anew. Returns whether there is such a setting here.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # not glibc
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _KEEP_BELOW_BYTES) and mallopt(_M_TRIM_THRESHOLD, _KEEP_BELOW_BYTES))


def has_cpp_compiler() -> bool:
    """Tell whether torch.compile can build its CPU kernels."""
    return any(shutil.which(name) for name in (os.environ.get("CXX") or "g++", "g++", "clang++"))


def cpu_vendor() -> str:
    """Return the processor's vendor as it names itself, such as GenuineIntel; empty where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":")[1].strip() for line in lines if line.startswith("vendor_id")), "")


def git_commit() -> str | None:
    """Return the commit of the checkout that this code runs from; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()


def environment_info() -> dict[str, Any]:
    """Return what environment.json says of this process: versions and hardware, no secrets."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "python": platform.python_version(),
        "turnout": turnout_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "cpu_vendor": cpu_vendor(),
        "git_commit": git_commit(),
        "gpu": gpu,
        "num_threads": torch.get_num_threads(),
        "world_size": 1,
    }
