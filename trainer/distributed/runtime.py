"""Process of a run: its device, memory allocator, compiler and versions.

Reads CXX from the environment, and sets defaults of PYTORCH_ALLOC_CONF and CUBLAS_WORKSPACE_CONFIG;
`trainer/environment.py` reads the launchers' variables.
"""

import ctypes
import os
import platform
import shutil
import subprocess
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import torch

from trainer.distributed.version import turnout_version
from trainer.environment import local_size_and_rank
from trainer.errors import ConfigError

_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD = -3, -1  # mallopt parameters of glibc
_KEEP_BELOW_BYTES = 1 << 30


def start(device: str) -> torch.device:
    """Set up the memory allocator and return this rank's device, as `parallel.device` names it.

    Raises:
        ConfigError: if a GPU is requested and there is none, or this node has fewer GPUs than ranks.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("parallel.device: cuda, but torch sees no GPU here; use auto or cpu")
    keep_freed_memory()
    if device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    prefer_expandable_segments(os.environ)  # before the first allocation, which reads it
    num_here, local_rank = local_size_and_rank()
    num_ranks = max(num_here or 1, local_rank + 1)
    num_gpus = torch.cuda.device_count()
    if num_ranks > num_gpus:  # raised on every rank of the node, not only on those without a GPU
        raise ConfigError(
            f"parallel.device: {num_ranks} ranks on this machine, but torch sees {num_gpus} GPU{'s' * (num_gpus > 1)}; "
            f"start at most {num_gpus} here (NPROC, --nproc-per-node), or use parallel.device=cpu"
        )
    chosen = torch.device("cuda", local_rank)
    torch.cuda.set_device(chosen)  # NCCL uses the current device
    return chosen


def prefer_expandable_segments(environment: MutableMapping[str, str]) -> None:
    """Let the GPU's memory pool grow in place, unless the user configures it.

    The rows of experts and messages have another size in every step; fixed segments would be fragmented by them.
    """
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & environment.keys():
        environment["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def use_deterministic_kernels() -> None:
    """Use only kernels whose results are the same bits in every run; an operation that has none raises RuntimeError."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the first product runs
    torch.use_deterministic_algorithms(True)
    # pyrefly: ignore[missing-attribute]
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads it


def keep_freed_memory() -> bool:
    """Let glibc keep freed blocks of up to 1 GiB instead of unmapping them; return False without glibc.

    Activations are freed and allocated again every step; by default each large one is a new mapping whose pages must be
    faulted in and zeroed again.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # not glibc
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _KEEP_BELOW_BYTES) and mallopt(_M_TRIM_THRESHOLD, _KEEP_BELOW_BYTES))


def has_cpp_compiler() -> bool:
    """Return whether torch.compile can build CPU kernels."""
    return any(shutil.which(name) for name in (os.environ.get("CXX") or "g++", "g++", "clang++"))


def cpu_vendor() -> str:
    """Return the CPU vendor, such as GenuineIntel; empty if unknown."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":")[1].strip() for line in lines if line.startswith("vendor_id")), "")


def git_commit() -> str | None:
    """Return the git commit of this code; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()


def environment_info() -> dict[str, Any]:
    """Return versions and hardware of this process for environment.json, without secrets."""
    return {
        "python": platform.python_version(),
        "turnout": turnout_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "cpu_vendor": cpu_vendor(),
        "git_commit": git_commit(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "num_threads": torch.get_num_threads(),
        "world_size": 1,
    }
