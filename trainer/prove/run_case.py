"""Run one layout: in this process, or on local ranks."""

from collections.abc import Callable
from dataclasses import asdict

import torch.distributed as dist

from trainer.distributed.flight_recorder import FlightRecorder
from trainer.distributed.mesh import Mesh, build_mesh
from trainer.distributed.rank_layout import Layout
from trainer.errors import CommError
from trainer.experiment import ExperimentConfig
from trainer.prove.cases import Case, apply_case
from trainer.prove.evidence import Evidence, collect
from trainer.prove.pool import Failure, LocalRanks


def run_case(
    config: ExperimentConfig,
    case: Case,
    ranks: LocalRanks,
    *,
    steps: int,
    timeout_s: float,
    prepare: Callable[[], None] | None = None,
) -> Evidence:
    """Train some steps of a config under a layout; one rank runs in this process. Raises the error of a rank.

    `prepare` is a module-level function called first on each of several ranks; tests plant faults with it.
    """
    config = apply_case(config, case)
    if case.world_size == 1:
        return collect(config, Mesh.of_one(), steps=steps, replays=case.replays, moves_to=case.moves_to)
    answers = ranks.run(case.world_size, _collect, config, case, steps, prepare, timeout_s=timeout_s)
    failures = {rank: answer for rank, answer in enumerate(answers) if isinstance(answer, Failure)}
    if not failures:
        return answers[0]
    lost = [rank for rank, failure in failures.items() if failure.is_lost]
    reasons = [f"ranks {lost} never finished a step"] if lost else []
    for rank, failure in failures.items():
        if failure.error is not None and not isinstance(failure.error, CommError):
            raise type(failure.error)(f"rank {rank}: {str(failure.error).removeprefix(f'rank {rank}: ')}")
        if not failure.is_lost:
            reasons.append(f"rank {rank}: {failure.error or failure.text.strip().splitlines()[-1]}")
    raise CommError(f"{case.name}: {'; '.join(reasons)}")


def _collect(config: ExperimentConfig, case: Case, steps: int, prepare: Callable[[], None] | None) -> Evidence:
    if prepare is not None:
        prepare()
    layout = Layout(
        world_size=case.world_size,
        rank=dist.get_rank(),
        ranks_per_node=case.ranks_per_node,
        **asdict(config.parallel.degrees),
    )
    mesh = build_mesh(layout, FlightRecorder())
    evidence = collect(config, mesh, steps=steps, replays=case.replays, moves_to=case.moves_to)
    return evidence if layout.rank == 0 else Evidence()
