"""Checks of how ranks are started: variables of NCCL, CUDA and OpenMP, and limits of the system. Import no torch."""

from collections.abc import Iterator

from trainer.console import formatting
from trainer.doctor.finding import Sign
from trainer.doctor.static.config_on_host import ConfigCheck, ConfigOnHost

_LEAST_SHARED = 1 << 30
_LEAST_LOCKED = 1 << 30
_FILES_PER_RANK, _FILES = 4, 512
"""Connections to a peer, and files of a rank itself."""
_INWARD = ("lo", "docker")
_ASYNC = ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "NCCL_ASYNC_ERROR_HANDLING")
_BLOCKING = ("TORCH_NCCL_BLOCKING_WAIT", "NCCL_BLOCKING_WAIT")
_DEBUGGING = {
    "CUDA_LAUNCH_BLOCKING": ("1",),
    "NCCL_DEBUG": ("TRACE",),
    "TORCH_DISTRIBUTED_DEBUG": ("DETAIL",),
    "TORCH_SHOW_CPP_STACKTRACES": ("1",),
    "PYTORCH_NO_CUDA_MEMORY_CACHING": ("1",),
}
"""Variables that are for finding faults, with the values that cost time."""


def _infiniband_off(subject: ConfigOnHost) -> Iterator[Sign]:
    host = subject.host
    if host.number("NCCL_IB_DISABLE") and (host.has_infiniband or (host.num_nodes > 1 and subject.on_gpu)):
        there = "this machine has such devices" if host.has_infiniband else f"there are {host.num_nodes} machines"
        severity = "severe" if host.has_infiniband and host.num_nodes > 1 else "warning"
        yield Sign(
            f"NCCL_IB_DISABLE={host.environment['NCCL_IB_DISABLE']} switches InfiniBand and RoCE off, and {there}",
            "unset it; name the devices by NCCL_IB_HCA if some are not for this",
            severity,
        )


def _direct_copies_off(subject: ConfigOnHost) -> Iterator[Sign]:
    host, variables = subject.host, subject.host.environment
    if not subject.on_gpu or host.ranks_here < 2:
        return
    if host.number("NCCL_P2P_DISABLE"):
        yield Sign("NCCL_P2P_DISABLE=1: GPUs of this machine do not use NVLink", "unset it")
    elif variables.get("NCCL_P2P_LEVEL", "").upper() in ("LOC", "0"):
        yield Sign(f"NCCL_P2P_LEVEL={variables['NCCL_P2P_LEVEL']}: GPUs do not use NVLink", "unset it, or use NVL")
    if host.number("NCCL_SHM_DISABLE"):
        yield Sign("NCCL_SHM_DISABLE=1: ranks of this machine talk over the network", "unset it, and enlarge /dev/shm")


def _inward_interface(subject: ConfigOnHost) -> Iterator[Sign]:
    for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        given = subject.host.environment.get(name, "")
        chosen = [each.lstrip("=") for each in given.split(",") if each]
        inward = [each for each in chosen if each.startswith(_INWARD)]
        if subject.host.num_nodes > 1 and inward and not given.startswith("^"):
            yield Sign(
                f"{name}={given}: {inward[0]} leads to no other of the {subject.host.num_nodes} machines",
                f"unset {name}, or name the interface between them",
            )


def _silent_hangs(subject: ConfigOnHost) -> Iterator[Sign]:
    for name in _ASYNC:
        if subject.host.environment.get(name, "").strip() == "0":
            yield Sign(f"{name}=0: a collective that failed is not ended", f"unset {name}")


def _blocking_wait(subject: ConfigOnHost) -> Iterator[Sign]:
    for name in _BLOCKING:
        if subject.host.number(name):
            yield Sign(f"{name}=1: the host waits for every collective", f"unset {name}")


def _debugging(subject: ConfigOnHost) -> Iterator[Sign]:
    for name, slow in _DEBUGGING.items():
        if (value := subject.host.environment.get(name, "").upper()) in slow:
            yield Sign(f"{name}={value} is set", f"unset {name} once the fault is found")


def _one_queue(subject: ConfigOnHost) -> Iterator[Sign]:
    if subject.on_gpu and subject.host.number("CUDA_DEVICE_MAX_CONNECTIONS") == 1 and subject.host.world_size > 1:
        yield Sign("CUDA_DEVICE_MAX_CONNECTIONS=1, which Megatron's tensor parallelism needs", "unset it, or use 32")


def _too_many_threads(subject: ConfigOnHost) -> Iterator[Sign]:
    host = subject.host
    threads = host.number("OMP_NUM_THREADS")
    if host.ranks_here < 2:
        return
    if threads is None:
        threads, how = host.cores, "OMP_NUM_THREADS is not set, so each takes all"
    else:
        how = f"OMP_NUM_THREADS={threads}"
    if threads * host.ranks_here > host.cores:
        yield Sign(
            f"{host.ranks_here} ranks on {host.cores} cores, and {how}: {threads * host.ranks_here} threads",
            f"export OMP_NUM_THREADS={host.cores // host.ranks_here}"
            if host.cores >= host.ranks_here
            else f"start at most {host.cores} ranks on a machine like this one",
        )


def _small_shared_memory(subject: ConfigOnHost) -> Iterator[Sign]:
    size = subject.host.shared_memory_bytes
    if subject.on_gpu and subject.host.ranks_here > 1 and size is not None and size < _LEAST_SHARED:
        yield Sign(f"/dev/shm has {formatting.size(size)}", "start the container with --shm-size=16g or --ipc=host")


def _few_open_files(subject: ConfigOnHost) -> Iterator[Sign]:
    limit, needed = subject.host.open_files, _FILES + _FILES_PER_RANK * subject.host.world_size
    if limit is not None and limit < needed:
        yield Sign(
            f"a process may open {limit} files, and with {subject.host.world_size} ranks it needs about {needed}",
            "ulimit -n 65535",
        )


def _little_locked_memory(subject: ConfigOnHost) -> Iterator[Sign]:
    limit = subject.host.locked_bytes
    if subject.on_gpu and subject.host.has_infiniband and limit is not None and limit < _LEAST_LOCKED:
        yield Sign(
            f"a process may lock {formatting.size(limit)} of memory, and InfiniBand sends from locked memory",
            "ulimit -l unlimited; for containers --ulimit memlock=-1",
        )


LAUNCH_CHECKS: tuple[ConfigCheck, ...] = (
    ConfigCheck(
        name="infiniband_off",
        severity="warning",
        find=_infiniband_off,
        why="between machines NCCL falls back to TCP: a fifth of the bandwidth",
        source="areal-project/AReaL#639; scottclowe/pytorch-experiment-template#11",
    ),
    ConfigCheck(
        name="direct_copies_off",
        severity="warning",
        find=_direct_copies_off,
        why="copies between GPUs go through the host's memory or its network",
        source="NVIDIA/nccl#631; Motphys/UniLab#1507",
    ),
    ConfigCheck(
        name="inward_interface",
        severity="severe",
        find=_inward_interface,
        why="ranks of other machines cannot connect: the start hangs",
        source="NVIDIA/nccl#286; horovod/horovod#789",
    ),
    ConfigCheck(
        name="silent_hangs",
        severity="warning",
        find=_silent_hangs,
        why="ranks wait for ever, and GPUs are paid for",
        source="pytorch/pytorch#46874",
    ),
    ConfigCheck(
        name="blocking_wait",
        severity="warning",
        find=_blocking_wait,
        why="nothing overlaps any more: up to 60 % slower",
        source="pytorch/pytorch#46874; NVIDIA/nccl#395",
    ),
    ConfigCheck(
        name="debugging_left_on",
        severity="warning",
        find=_debugging,
        why="kernels or collectives run one by one, or every call is checked",
        source="jishengpeng/WavTokenizer#17; pytorch/pytorch#64073",
    ),
    ConfigCheck(
        name="one_queue",
        severity="warning",
        find=_one_queue,
        why="communication of FSDP2 and all-to-alls do not overlap with computation",
        source="pytorch/torchtitan#1147; verl-project/verl-omni#421",
    ),
    ConfigCheck(
        name="too_many_threads",
        severity="warning",
        find=_too_many_threads,
        why="threads push each other off the cores: measured 1.3 to 1.75 times slower",
        source="pytorch/torchtitan#4031; pytorch/pytorch#22260",
    ),
    ConfigCheck(
        name="small_shared_memory",
        severity="severe",
        find=_small_shared_memory,
        why="NCCL cannot make its buffers, and the start fails",
        source="NVIDIA/nccl#342; NVIDIA/nccl#290",
    ),
    ConfigCheck(
        name="few_open_files",
        severity="warning",
        find=_few_open_files,
        why="connections or the first checkpoint fail: too many open files",
        source="google-research/t5x#447; pytorch/tensorpipe#460",
    ),
    ConfigCheck(
        name="little_locked_memory",
        severity="severe",
        find=_little_locked_memory,
        why="NCCL cannot register its buffers, and the start fails",
        source="NVIDIA/nccl-tests#206; openucx/ucx#8229",
    ),
)
