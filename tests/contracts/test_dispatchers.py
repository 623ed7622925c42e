"""Dispatchers on several ranks: outputs and gradients equal those of all experts in one process."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.builders import make_context
from tests.ranks import Ranks, mesh_here
from tests.registries import DISPATCHERS
from trainer.distributed.rank_layout import even_slice
from trainer.moe.capacity import limit_to_capacity
from trainer.moe.dispatch.local import LocalDispatcher
from trainer.moe.dispatch.registry import ExchangeOptions
from trainer.moe.layer_options import CapacityConfig
from trainer.moe.routing import RoutingDecision
from trainer.ops.kernels import run_experts as run_kernel

D, F, SEQUENCES, SEQ_LEN = 6, 5, 2, 4
TOKENS = SEQUENCES * SEQ_LEN

# hierarchical: 4 ranks are 2 hosts of 2; fewer ranks need one hop
AT_CAPACITY = {kind: config() for kind, config in DISPATCHERS.items() if kind != "local"}
DROPLESS = {kind: config for kind, config in AT_CAPACITY.items() if kind != "padded_all_to_all"}
IN_CHUNKS = {
    name: config.model_copy(update={"chunks": 2})
    for name, config in AT_CAPACITY.items()
    if isinstance(config, ExchangeOptions)
}

# (ranks, experts, experts per token)
SHAPES = {
    "even": (2, 4, 2),
    "uneven": (3, 8, 2),
    "one expert per rank": (4, 4, 2),
    "uneven over two hosts": (4, 6, 2),
    "every expert for every token": (2, 3, 3),
    "one choice": (2, 4, 1),
}


def _choices(case: str, rank: int, num_experts: int, top_k: int) -> tuple[Tensor, Tensor]:
    """Return the experts (T, k) and validity (T,) of a rank's tokens."""
    generator = torch.Generator().manual_seed(17 * rank + 3)
    chosen = torch.stack([torch.randperm(num_experts, generator=generator)[:top_k] for _ in range(TOKENS)])
    valid = torch.ones(TOKENS, dtype=torch.bool)
    match case:
        case "random":
            valid[-1] = False
        case "all to one expert":
            chosen = (torch.arange(top_k) + num_experts - 1).remainder(num_experts).expand(TOKENS, -1).clone()
        case "rank 0 has no token":
            valid[:] = rank != 0
        case "one token in all":
            valid[:] = False
            valid[0] = rank == 1
        case "everything dropped":
            valid[:] = False
    return chosen, valid


CASES = ["random", "all to one expert", "rank 0 has no token", "one token in all", "everything dropped"]


def _decision(rank: int, case: str, num_experts: int, top_k: int, factor: float | None) -> RoutingDecision:
    chosen, valid = _choices(case, rank, num_experts, top_k)
    generator = torch.Generator().manual_seed(rank)
    if case == "a varying number of experts":  # at most one on rank 0, and at most all of them on the others
        mask = torch.rand(TOKENS, num_experts, generator=generator) < 0.5
        mask &= (torch.arange(num_experts) == 1) | torch.tensor(rank > 0)
        every = torch.rand(TOKENS, num_experts, generator=generator, dtype=torch.float64).requires_grad_()
        return RoutingDecision.from_mask(mask, every, valid=valid)
    weight = torch.rand(TOKENS, top_k, generator=generator, dtype=torch.float64).requires_grad_()
    decision = RoutingDecision.from_top_k(chosen, weight, num_experts=num_experts, valid=valid)
    context = make_context(SEQUENCES, SEQ_LEN, valid)
    return limit_to_capacity(decision, CapacityConfig(factor=factor, min=1), context)


def _weights(num_experts: int) -> tuple[Tensor, Tensor]:
    """Return w_in and w_out of a size at which outputs and gradients are of the order of 1, as the tolerance is."""
    generator = torch.Generator().manual_seed(99)
    w_in = torch.randn(num_experts, 2 * F, D, generator=generator, dtype=torch.float64) / D**0.5
    return w_in, torch.randn(num_experts, D, F, generator=generator, dtype=torch.float64) / F**0.5


def _tokens(rank: int) -> Tensor:
    return torch.randn(TOKENS, D, generator=torch.Generator().manual_seed(rank + 50), dtype=torch.float64)


def _through(dispatcher: Any, rank: int, experts: tuple[int, int], decision: RoutingDecision, num_experts: int) -> dict:
    """Return the output, and the gradients of its squared sum for tokens, combine weights and local experts."""
    w_in, w_out = (w[slice(*experts)].clone().requires_grad_() for w in _weights(num_experts))
    x = _tokens(rank).requires_grad_()
    seen = []

    def run_experts(
        x: Tensor,
        expert_index: Tensor,
        weight: Tensor,
        *,
        num_rows: int | None = None,
        part: tuple[int, int] | None = None,
    ) -> Tensor:
        mine = slice(*(part or (0, len(w_in))))
        seen.append(mine)
        assert len(expert_index) == len(weight) == len(x)
        assert num_rows in (None, int((expert_index < len(w_in[mine])).sum()))
        return run_kernel("loop", x, expert_index, weight, w_in[mine], w_out[mine], "swiglu", num_rows=num_rows)

    y = dispatcher.forward(x, decision, run_experts)
    assert y.shape == x.shape
    assert [e for mine in seen for e in range(mine.start, mine.stop)] == list(range(len(w_in)))
    names = ("x", "weight", "w_in", "w_out")
    gradients = torch.autograd.grad(y.square().sum(), (x, decision.combine_weight, w_in, w_out))
    return {"y": y.detach(), **dict(zip(names, gradients, strict=True))}


def on_a_rank(config: Any, case: str, num_experts: int, top_k: int, factor: float | None) -> dict:
    """Compute with one rank's experts, through the dispatcher."""
    world_size = dist.get_world_size()
    mesh = mesh_here(ep_size=world_size, ranks_per_node=2)
    dispatcher = config.build(mesh, num_experts)
    decision = _decision(mesh.layout.rank, case, num_experts, top_k, factor)
    here = even_slice(num_experts, mesh.ep.size, mesh.ep.index)
    return _through(dispatcher, mesh.layout.rank, here, decision, num_experts)


def _compare(ranks: Ranks, config: Any, case: str, shape: tuple[int, int, int], factor: float | None) -> None:
    world, num_experts, top_k = shape
    there = ranks.run(world, on_a_rank, config, case, num_experts, top_k, factor)
    alone = [
        _through(
            LocalDispatcher(), rank, (0, num_experts), _decision(rank, case, num_experts, top_k, factor), num_experts
        )
        for rank in range(world)
    ]
    for mine, oracle in zip(there, alone, strict=True):
        torch.testing.assert_close(mine["y"], oracle["y"], rtol=0, atol=1e-12)
        torch.testing.assert_close(mine["x"], oracle["x"], rtol=0, atol=1e-12)
        torch.testing.assert_close(mine["weight"], oracle["weight"], rtol=0, atol=1e-12)
    for name in ("w_in", "w_out"):  # the rank of an expert sums over the tokens of all ranks
        whole = torch.cat([mine[name] for mine in there])
        torch.testing.assert_close(whole, torch.stack([o[name] for o in alone]).sum(0), rtol=0, atol=1e-11)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("case", [*CASES, "a varying number of experts"])
@pytest.mark.parametrize("config", DROPLESS.values(), ids=DROPLESS.keys())
def test_dropless_equals_a_single_process(ranks: Ranks, config: Any, case: str) -> None:
    for shape in SHAPES.values():
        _compare(ranks, config, case, shape, None)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("config", AT_CAPACITY.values(), ids=AT_CAPACITY.keys())
def test_with_a_capacity_equals_a_single_process(ranks: Ranks, config: Any, case: str) -> None:
    for shape in SHAPES.values():
        _compare(ranks, config, case, shape, 1.0)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("config", IN_CHUNKS.values(), ids=IN_CHUNKS.keys())
def test_chunks_do_not_change_the_result(ranks: Ranks, config: Any, case: str) -> None:
    for shape, factor in (((2, 4, 2), 1.0), ((3, 8, 2), None), ((4, 9, 2), 1.0)):
        _compare(ranks, config, case, shape, factor)
