"""Refuse processes that srun or mpirun has started without a launcher for ranks. Imports no torch.

Each of them would train the same run in the same folder.
"""

from collections.abc import Mapping

from trainer.environment import Variables

_MPI = (
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("PMI_SIZE", "PMI_RANK"),
    ("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"),
)
"""World size and rank, as set by Open MPI, by MPICH and Intel MPI, and by MVAPICH."""
_ADVICE = (
    "start the ranks of one node by one process (NPROC=N ./launch.sh CONFIG, or torchrun), and those of several "
    "nodes by scripts/slurm.sh or one launch.sh on each"
)


def check_tasks(environment: Mapping[str, str], *, expected: int) -> None:
    """Check that this is not one of several processes that would each start the same run.

    `expected` is the intended number of processes: the nodes, under `launch`.

    Raises:
        ConfigError: naming the variable with their number, and how to start several ranks.
    """
    variables = Variables(environment)
    sizes = {size: variables.number(size, least=1) for size, rank in _MPI if environment.get(rank)}
    name = _of_step(environment)
    if name is not None:
        sizes[name] = variables.number(name, least=1)
    variables.problems += [
        f"{name}={size}: so many processes were started, and each would train the same run by itself; {_ADVICE}"
        for name, size in sizes.items()
        if size > expected
    ]
    variables.problems = variables.problems[:1]  # srun also sets PMI_SIZE
    variables.check()


def task_warning(environment: Mapping[str, str]) -> str | None:
    """Return a warning if a batch job with several tasks trains in one process, which may be intended; else None."""
    tasks = environment.get("SLURM_NTASKS", "")
    if _of_step(environment) is not None or not environment.get("SLURM_PROCID") or tasks in ("", "1"):
        return None
    return f"SLURM_NTASKS={tasks}, and this run has one process; for more, {_ADVICE}"


def _of_step(environment: Mapping[str, str]) -> str | None:
    """Return the variable with the number of tasks in this process's srun step; None outside of a step.

    An allocation alone starts no tasks: salloc's shell has SLURM_NTASKS without SLURM_PROCID, and a batch script has
    SLURM_PROCID=0 without a step.
    """
    if environment.get("SLURM_STEP_NUM_TASKS"):
        return "SLURM_STEP_NUM_TASKS"
    procid = environment.get("SLURM_PROCID", "")
    is_of_step = procid not in ("", "0") or (procid == "0" and environment.get("SLURM_STEP_ID"))
    return "SLURM_NTASKS" if is_of_step and environment.get("SLURM_NTASKS") else None
