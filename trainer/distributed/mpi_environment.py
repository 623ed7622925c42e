"""Processes that srun or mpirun has started side by side, and that know nothing of each other. Imports no torch.

Each of them would train the same run in the same folder: they are refused, and told how ranks are started.
"""

from collections.abc import Mapping

from trainer.environment import Variables

_MPI = (
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("PMI_SIZE", "PMI_RANK"),
    ("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"),
)
"""Variables by which Open MPI, MPICH and Intel MPI, and MVAPICH tell a process the world size and its rank."""
_ADVICE = (
    "start the ranks of one machine by one process (NPROC=N ./launch.sh CONFIG, or torchrun), and those of several "
    "machines by scripts/slurm.sh or one launch.sh on each"
)


def check_tasks(environment: Mapping[str, str], *, expected: int) -> None:
    """Refuse to be one of several processes that would each start the same run.

    Args:
        environment: of this process.
        expected: how many the user knows of: the machines, under `launch`.

    Raises:
        ConfigError: naming the variable that says so, and how several ranks are started.
    """
    variables = Variables(environment)
    sizes = {size: variables.number(size, least=1) for size, rank in _MPI if environment.get(rank)}
    name = _of_step(environment)
    if name is not None:
        sizes[name] = variables.number(name, least=1)
    variables.problems += [
        f"{name}={size}: is how many processes were started, and each would train the same run by itself; {_ADVICE}"
        for name, size in sizes.items()
        if size > expected
    ]
    variables.problems = variables.problems[:1]  # srun sets PMI_SIZE too
    variables.check()


def task_warning(environment: Mapping[str, str]) -> str | None:
    """Return what to say in a batch script for several tasks that trains in one process, or None: it may be meant."""
    tasks = environment.get("SLURM_NTASKS", "")
    if _of_step(environment) is not None or not environment.get("SLURM_PROCID") or tasks in ("", "1"):
        return None
    return f"SLURM_NTASKS={tasks}, and this run has one process; for more, {_ADVICE}"


def _of_step(environment: Mapping[str, str]) -> str | None:
    """Return the variable that has how many tasks srun has started, this one among them; None if it has started none.

    An allocation of several tasks starts nothing: in the shell of salloc there is SLURM_NTASKS and no SLURM_PROCID, in
    a batch script it is 0 and there is no step.
    """
    if environment.get("SLURM_STEP_NUM_TASKS"):
        return "SLURM_STEP_NUM_TASKS"
    procid = environment.get("SLURM_PROCID", "")
    is_of_step = procid not in ("", "0") or (procid == "0" and environment.get("SLURM_STEP_ID"))
    return "SLURM_NTASKS" if is_of_step and environment.get("SLURM_NTASKS") else None
