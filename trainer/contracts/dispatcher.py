"""Contract of a dispatcher: on any number of ranks, outputs and gradients are those of all experts in one process.

# T tokens of a rank, k experts per token, E experts, D d_model, F d_ff.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.contracts.ensure import ContractError, ensure
from trainer.distributed.flight_recorder import FlightRecorder
from trainer.distributed.mesh import Mesh, build_mesh
from trainer.distributed.rank_layout import Layout, even_slice
from trainer.lab.logits import training_context
from trainer.moe.capacity import limit_to_capacity
from trainer.moe.config import CapacityConfig
from trainer.moe.dispatch.base import Dispatcher
from trainer.moe.dispatch.local import LocalDispatcher
from trainer.moe.dispatch.registry import DispatcherOptions
from trainer.moe.routing import RoutingDecision
from trainer.ops.expert_ffn import reference_ffn
from trainer.prove.pool import Failure, LocalRanks

D, F, T, K = 6, 5, 8, 2
_TIMEOUT_S = 60.0


class Routed(NamedTuple):
    """Outputs (T, D) of a rank's tokens, and gradients of their squared sum: of x, combine weights, local experts."""

    y: Tensor
    x_grad: Tensor
    weight_grad: Tensor
    w_in_grad: Tensor


def one_rank_equals_local(config: DispatcherOptions) -> None:
    """On one rank, outputs and gradients are those of the local dispatcher."""
    dispatcher = config.build(Mesh.of_one(), 4)
    _compare([_route(dispatcher, 0, (0, 4), 4)], num_experts=4)


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
    _compare(answers, num_experts=num_experts)


def _on_a_rank(config: DispatcherOptions, num_experts: int) -> Routed:
    world_size, rank = dist.get_world_size(), dist.get_rank()
    layout = Layout(world_size=world_size, rank=rank, ep_size=world_size, ranks_per_node=world_size)
    mesh = build_mesh(layout, FlightRecorder())
    here = even_slice(num_experts, mesh.ep.size, mesh.ep.index)
    return _route(config.build(mesh, num_experts), rank, here, num_experts)


def _compare(there: list[Routed], *, num_experts: int) -> None:
    """Compare every rank with one process that has all experts and that rank's tokens."""
    alone = [_route(LocalDispatcher(), rank, (0, num_experts), num_experts) for rank in range(len(there))]
    for rank, (one, other) in enumerate(zip(there, alone, strict=True)):
        for name in ("y", "x_grad", "weight_grad"):
            _same(getattr(one, name), getattr(other, name), f"rank {rank}: {name}")
    _same(torch.cat([one.w_in_grad for one in there]), sum(one.w_in_grad for one in alone), "gradient of the experts")


def _same(found: Tensor, expected: Any, what: str) -> None:
    ensure(found.shape == expected.shape, f"{what} has shape {tuple(found.shape)}, not {tuple(expected.shape)}")
    ensure(torch.allclose(found, expected, rtol=1e-10, atol=1e-10), f"{what} differs from that of one process")


def _route(dispatcher: Dispatcher, rank: int, experts: tuple[int, int], num_experts: int) -> Routed:
    """Send the tokens of a rank through the dispatcher to the experts first .. end - 1, which are here."""
    shared, own = torch.Generator().manual_seed(99), torch.Generator().manual_seed(rank)
    w_in = torch.randn(num_experts, 2 * F, D, generator=shared, dtype=torch.float64)[slice(*experts)].requires_grad_()
    w_out = torch.randn(num_experts, D, F, generator=shared, dtype=torch.float64)[slice(*experts)]
    x = torch.randn(T, D, generator=own, dtype=torch.float64).requires_grad_()
    decision = _decision(num_experts, own)

    def run_experts(
        x: Tensor,
        expert_index: Tensor,
        weight: Tensor,
        *,
        num_rows: int | None = None,
        part: tuple[int, int] | None = None,
    ) -> Tensor:
        mine = slice(*(part or (0, len(w_in))))
        found = int((expert_index < len(w_in[mine])).sum())
        ensure(num_rows in (None, found), f"num_rows is {num_rows}, and {found} experts are there")
        return reference_ffn(x, expert_index, weight, w_in[mine], w_out[mine], "swiglu")

    y = dispatcher.forward(x, decision, run_experts)
    grads = torch.autograd.grad(y.square().sum(), (x, decision.combine_weight, w_in))
    return Routed(y.detach(), *grads)


def _decision(num_experts: int, generator: torch.Generator) -> RoutingDecision:
    """Choose K experts for each token; the last token is padding, and a capacity drops some assignments."""
    chosen = torch.stack([torch.randperm(num_experts, generator=generator)[:K] for _ in range(T)])
    weight = torch.rand(T, K, generator=generator, dtype=torch.float64).requires_grad_()
    valid = torch.arange(T) < T - 1
    context = training_context(torch.zeros(1, T, dtype=torch.int64), valid, seed=0)
    decision = RoutingDecision.from_top_k(chosen, weight, num_experts=num_experts, valid=valid)
    return limit_to_capacity(decision, CapacityConfig(factor=2.0, min=1), context)
