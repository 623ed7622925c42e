"""Contract of a dispatcher: on any number of ranks, outputs and gradients are those of all experts in one process."""

import torch
import torch.distributed as dist

from trainer.contracts.ensure import ContractError, ensure
from trainer.distributed.flight_recorder import FlightRecorder
from trainer.distributed.mesh import Mesh, build_mesh
from trainer.distributed.rank_layout import Layout
from trainer.moe.dispatch.registry import DispatcherOptions
from trainer.parallel.dispatcher_canary import RowDtypes, dispatcher_fault
from trainer.prove.pool import Failure, LocalRanks

_TIMEOUT_S = 60.0
_DTYPES = RowDtypes(compute=torch.float64, wire=torch.float64)


def one_rank_equals_local(config: DispatcherOptions) -> None:
    """On one rank, outputs and gradients are those of the local dispatcher."""
    _ensure_equal(dispatcher_fault(config.build(Mesh.of_one(), 4), Mesh.of_one(), 4, _DTYPES, torch.device("cpu")))


def two_ranks_equal_one(config: DispatcherOptions) -> None:
    """On two ranks with two experts each, outputs and gradients are those of one process."""
    _on_ranks(config, world_size=2, num_experts=4)


def uneven_experts_equal_one(config: DispatcherOptions) -> None:
    """On three ranks with three, three and two experts, outputs and gradients are those of one process."""
    _on_ranks(config, world_size=3, num_experts=8)


CHECKS = [one_rank_equals_local, two_ranks_equal_one, uneven_experts_equal_one]


def _on_ranks(config: DispatcherOptions, *, world_size: int, num_experts: int) -> None:
    ranks = LocalRanks()
    try:
        answers = ranks.run(world_size, _on_a_rank, config, num_experts, timeout_s=_TIMEOUT_S)
    finally:
        ranks.close()
    for rank, answer in enumerate(answers):
        if isinstance(answer, Failure):
            raise ContractError(f"rank {rank}: {answer.text.strip().splitlines()[-1] if answer.text else 'is lost'}")
    for rank, fault in enumerate(answers):
        _ensure_equal(fault, f"rank {rank}: ")


def _on_a_rank(config: DispatcherOptions, num_experts: int) -> str | None:
    world_size, rank = dist.get_world_size(), dist.get_rank()
    layout = Layout(world_size=world_size, rank=rank, ep_size=world_size, ranks_per_node=world_size)
    mesh = build_mesh(layout, FlightRecorder())
    return dispatcher_fault(config.build(mesh, num_experts), mesh, num_experts, _DTYPES, torch.device("cpu"))


def _ensure_equal(fault: str | None, where: str = "") -> None:
    ensure(fault is None, f"{where}{fault}")
