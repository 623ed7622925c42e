"""The dispatcher canary: all dispatchers of this project pass on their ranks, and broken ones are caught on each."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ranks import Ranks, mesh_here
from tests.registries import DISPATCHERS
from trainer.distributed.mesh import Mesh
from trainer.moe.dispatch.all_to_all import AllToAllDispatcher, RowExchange
from trainer.moe.dispatch.base import Dispatched
from trainer.moe.dispatch.local import LocalDispatcher
from trainer.moe.dispatch.registry import AllToAllDispatcherConfig, DispatcherOptions
from trainer.moe.routing import RoutingDecision
from trainer.parallel.dispatcher_canary import RowDtypes, dispatcher_fault

CPU = torch.device("cpu")
FLOAT64 = RowDtypes(compute=torch.float64, wire=torch.float64)
FLOAT32 = RowDtypes(compute=torch.float32, wire=torch.float32)
BFLOAT16 = RowDtypes(compute=torch.bfloat16, wire=torch.bfloat16)
ROUNDED = RowDtypes(compute=torch.float32, wire=torch.bfloat16)


class StaleAllToAll(AllToAllDispatcher):
    """mori#675: the buffer of the first exchange is sent again."""

    kept: Tensor | None = None

    def start(self, rows: Tensor, sizes: Any) -> Any:
        kept = self.kept = rows.detach().clone() if self.kept is None else self.kept
        n = min(len(kept), len(rows))
        return super().start(torch.cat([kept[:n], rows[n:]]), sizes)


class MutedAllToAll(AllToAllDispatcher):
    """The combine weights get no gradient (Automodel#2995)."""

    def depart(self, rows: Tensor, sizes: Any) -> Any:
        return super().depart(rows.detach() if rows.shape[1] == 1 else rows, sizes)


class ForgetfulLocal(LocalDispatcher):
    """The last token is not dispatched."""

    def begin(self, x: Tensor, decision: RoutingDecision) -> Dispatched:
        return super().begin(torch.cat([x[:6], x[:2]]), decision)


def _build(build: Callable[..., Any] | DispatcherOptions, mesh: Mesh, num_experts: int) -> Any:
    return build.build(mesh, num_experts) if isinstance(build, DispatcherOptions) else build(mesh.ep, num_experts)


def _fault(build: Any, num_experts: int, ep_size: int, dtypes: RowDtypes, ranks_per_node: int) -> str | None:
    mesh = mesh_here(ep_size=ep_size, ranks_per_node=ranks_per_node)
    return dispatcher_fault(_build(build, mesh, num_experts), mesh, num_experts, dtypes, CPU)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("dtypes", [FLOAT64, FLOAT32, BFLOAT16, ROUNDED], ids=["double", "float", "bf16", "rounded"])
@pytest.mark.parametrize("kind", [kind for kind in DISPATCHERS if kind != "local"])
def test_dispatchers_of_this_project_pass_on_four_ranks(ranks: Ranks, kind: str, dtypes: RowDtypes) -> None:
    config = DISPATCHERS[kind](wire="bfloat16" if dtypes is ROUNDED else "compute")
    for num_experts, ep_size in ((6, 4), (4, 2), (1, 1)):
        assert ranks.run(4, _fault, config, num_experts, ep_size, dtypes, 2) == [None] * 4
    assert ranks.run(2, _fault, config.model_copy(update={"chunks": 2}), 6, 2, dtypes, 2) == [None] * 2


def test_a_stale_payload_is_caught_by_the_second_pass_on_each_rank(ranks: Ranks) -> None:
    for fault in ranks.run(2, _fault, StaleAllToAll, 4, 2, FLOAT32, 2):
        # The first exchange of the first pass is right, and its way back is already stale.
        assert fault is not None and "of token" in fault and "is off by" in fault


def test_combine_weights_without_a_gradient_are_caught(ranks: Ranks) -> None:
    for fault in ranks.run(2, _fault, MutedAllToAll, 4, 2, FLOAT32, 2):
        assert fault is not None and "pass 1: the gradient of the combine weights is off by 1" in fault


def test_one_process_is_checked_too() -> None:
    mesh = Mesh.of_one()
    for dtypes in (FLOAT64, FLOAT32, BFLOAT16):
        assert dispatcher_fault(AllToAllDispatcherConfig().build(mesh, 4), mesh, 4, dtypes, CPU) is None
    fault = dispatcher_fault(ForgetfulLocal(), mesh, 4, FLOAT32, CPU)
    assert fault is not None and fault.startswith("pass 1: the output of token 6 is off by")


def test_rows_that_are_rounded_on_the_way_pass_only_as_such(ranks: Ranks) -> None:
    config = AllToAllDispatcherConfig(wire="bfloat16")
    assert ranks.run(2, _fault, config, 4, 2, ROUNDED, 2) == [None] * 2
    assert None not in ranks.run(2, _fault, config, 4, 2, FLOAT32, 2)


def test_a_payload_that_is_not_moved_is_not_finite(ranks: Ranks) -> None:
    for fault in ranks.run(2, _fault, _Unmoved, 4, 2, FLOAT32, 2):
        assert fault is not None and "is not finite" in fault


class _Unmoved(AllToAllDispatcher):
    """The receive buffer is never written."""

    def arrived(self, exchange: RowExchange, dtype: torch.dtype) -> Dispatched:
        here = super().arrived(exchange, dtype)
        return here._replace(x=torch.empty_like(here.x) + 0 * here.x)
