"""Dispatchers by libraries for GPUs, on doubles of these: the contract of dispatchers, and what they refuse."""

from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pydantic import ValidationError

from tests.contracts import test_dispatchers
from tests.doubles import deep_ep, nccl_ep, symmetric_memory
from tests.doubles.deep_ep import EPHandle, doubled
from tests.laws import test_overlap
from tests.ranks import Ranks, mesh_here
from tests.registries import LIBRARY_DISPATCHERS
from trainer.config.loader import load
from trainer.distributed.mesh import Mesh
from trainer.errors import ConfigError
from trainer.experiment import ExperimentConfig
from trainer.moe.dispatch.deepep import DeepEPDispatcher
from trainer.moe.dispatch.local import LocalDispatcher
from trainer.moe.dispatch.registry import (
    DeepEPDispatcherConfig,
    DispatcherOptions,
    NcclEPDispatcherConfig,
    SymmetricMemoryDispatcherConfig,
)
from trainer.moe.routing import RoutingDecision
from trainer.parallel.dispatcher_canary import RowDtypes, dispatcher_fault

DEEPEP = DeepEPDispatcherConfig(tokens_per_rank=64)
NCCL_EP = NcclEPDispatcherConfig(tokens_per_rank=64)
CONFIGS = {"deepep": DEEPEP, "nccl_ep": NCCL_EP, "symmetric_memory": SymmetricMemoryDispatcherConfig()}
SHARED, TOP_P = "parallel.dispatcher={kind: symmetric_memory}", "model.moe.router={kind: top_p}"
SHAPES = {
    "deepep": [(2, 4, 2), (2, 4, 1), (4, 8, 3), (4, 4, 2)],
    "nccl_ep": [(2, 4, 1), (4, 8, 3)],  # the same code but for the library's calls
    "symmetric_memory": [(2, 4, 1), (2, 3, 3), (3, 8, 2), (4, 16, 3)],
}
LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (2, {}),
    (4, {"overlap": "micro_batches", "recompute": "block"}),
    (4, {"replicas": 2}),
]


def as_double(kind: str, *, wide: bool = True) -> AbstractContextManager[None]:
    """Let this process have a library, in float64 too if `wide`. Symmetric memory sends any dtype."""
    if kind == "symmetric_memory":
        return symmetric_memory.doubled()
    double = {"deepep": deep_ep.doubled, "nccl_ep": nccl_ep.doubled}[kind]
    return double(rows=torch.float64, weights=torch.float64) if wide else double()


def test_every_library_has_a_double() -> None:
    assert set(LIBRARY_DISPATCHERS) == set(CONFIGS) == set(SHAPES)


def doubled_on_a_rank(config: DispatcherOptions, *args: Any) -> dict:
    """Compute as the contract of dispatchers does, in float64."""
    with as_double(config.kind):
        return test_dispatchers.on_a_rank(config, *args)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("factor", [None, 1.0])
@pytest.mark.parametrize("case", test_dispatchers.CASES)
@pytest.mark.parametrize("kind", CONFIGS)
def test_it_equals_a_single_process(
    ranks: Ranks, kind: str, case: str, factor: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(test_dispatchers, "on_a_rank", doubled_on_a_rank)
    for shape in SHAPES[kind]:
        test_dispatchers._compare(ranks, CONFIGS[kind], case, shape, factor)


def canary(kind: str, num_experts: int) -> str | None:
    mesh = mesh_here(ep_size=dist.get_world_size())
    dtypes = RowDtypes(compute=torch.bfloat16, wire=torch.bfloat16)
    with as_double(kind, wide=False):
        dispatcher = CONFIGS[kind].build(mesh, num_experts)
        return dispatcher_fault(dispatcher, mesh, num_experts, dtypes, torch.device("cpu"))


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("kind", CONFIGS)
def test_the_canary_of_a_start_passes_in_the_dtypes_of_the_library(ranks: Ranks, kind: str, world_size: int) -> None:
    assert ranks.run(world_size, canary, kind, 8) == [None] * world_size


def learned(kind: str, layout: dict[str, Any], parallel: dict[str, Any]) -> float:
    """Return the largest difference of what is learned from what `all_to_all` learns."""
    own = {"dispatcher": CONFIGS[kind].model_dump()}
    moe = {"num_shared_experts": 1, "capacity": {"factor": 1.0, "min": 1}}
    with as_double(kind):
        (_, plain), (_, ours) = (
            test_overlap._train(test_overlap._engine(layout, options, {"moe": moe}), 3, is_packed=False)
            for options in ({}, {**parallel, **own})
        )
    return max(float((ours[name] - plain[name]).abs().max()) for name in ours if ours[name].shape == plain[name].shape)


@pytest.mark.one_in(3)
@pytest.mark.parametrize(("world_size", "parallel"), LAYOUTS, ids=str)
@pytest.mark.parametrize("kind", CONFIGS)
def test_it_learns_what_all_to_all_does(ranks: Ranks, kind: str, world_size: int, parallel: dict[str, Any]) -> None:
    for largest in ranks.run(world_size, learned, kind, {"ep_size": 2}, parallel):
        assert largest < 1e-9


def sharded(kind: str) -> float:
    model = {"moe": {"num_shared_experts": 1}}
    own = {"data": "shard", "dispatcher": CONFIGS[kind].model_dump()}
    with as_double(kind):
        return test_overlap.differences({"ep_size": 2}, own, model, 3, torch.float64)[0]


@pytest.mark.one_in(3)
@pytest.mark.parametrize("kind", CONFIGS)
def test_sharded_weights_are_there_for_two_micro_batches(ranks: Ranks, kind: str) -> None:
    assert max(ranks.run(4, sharded, kind)) < 1e-9


def refusals() -> list[str]:
    mesh = mesh_here(ep_size=2)
    x, weight = torch.zeros(3, 16), torch.ones(3, 1)
    valid = torch.ones(3, dtype=torch.bool)
    fixed = RoutingDecision.from_top_k(torch.zeros(3, 1, dtype=torch.int64), weight, num_experts=4, valid=valid)
    varying = RoutingDecision.from_mask(torch.ones(3, 4, dtype=torch.bool), torch.ones(3, 4), valid=valid)
    said = []

    def note(act: Any) -> None:
        with pytest.raises(ConfigError) as caught:
            act()
        said.append(str(caught.value))

    note(lambda: DEEPEP.build(mesh, 5))
    note(lambda: DEEPEP.build(mesh, 4).begin(x, fixed))  # without the package
    note(lambda: NCCL_EP.build(mesh, 4).begin(x, fixed))
    with doubled():
        note(lambda: DEEPEP.build(mesh, 4).begin(x, varying))
        note(lambda: DeepEPDispatcherConfig(tokens_per_rank=2).build(mesh, 4).begin(x, fixed))
        note(lambda: DeepEPDispatcher(mesh.ep, 4, 64)._buffer(0, 1))  # what the library asserts
    return said


def test_what_it_cannot_do_is_refused_by_name(ranks: Ranks) -> None:
    for said in ranks.run(2, refusals):
        uneven, package, extensions, varying, tokens, library = said
        assert "nccl_ep: needs nccl, which is not installed; pip install 'nccl-extensions[cu13]'" in extensions
        assert "equally many experts on all ranks, and 5 over ep_size 2" in uneven
        assert "needs deep_ep, which is not installed; pip install git+https" in package
        assert "needs a fixed number of experts per token" in varying
        assert "tokens_per_rank: 2, and a pass has 3 tokens; raise it" in tokens
        assert "DeepEP does not start here: AssertionError" in library


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.dtype=float32"], "deepep sends rows in bfloat16, and train.dtype is float32"),
        (["parallel.device=cpu"], "deepep exchanges between GPUs, and parallel.device is cpu"),
        (["parallel.ep_size=3"], "equally many experts on all ranks, not 8 experts over ep_size 3"),
        (["model.moe.diversity_coef=0.1"], "does not dispatch each assignment apart"),
        (["model.moe.router={kind: expert_choice}"], "needs a fixed number of experts per token, unlike expert_choice"),
        (["parallel.micro_batch_size=128"], "tokens_per_rank: 8192, and a micro-batch has 16384 tokens"),
        ([SHARED, "parallel.device=cpu"], "symmetric_memory exchanges between GPUs, and parallel.device is cpu"),
        ([SHARED, "parallel.ep_size=64", "model.moe.num_experts=64"], "exchanges between at most 32 ranks; use 32"),
        (
            ["parallel.dispatcher={kind: symmetric_memory, row_budget: 2}", TOP_P],
            "top_p has no fixed number of experts",
        ),
    ],
)
def test_a_config_that_it_cannot_do_is_refused(overrides: list[str], words: str) -> None:
    given = ["parallel.dispatcher={kind: deepep}", "train.dtype=bfloat16", "model.moe.num_experts=8", *overrides]
    with pytest.raises((ConfigError, ValidationError)) as caught:
        load("configs/quickstart.yaml", given, ExperimentConfig)
    assert words in str(caught.value)


def test_tokens_of_a_row_that_ranks_share_count_once() -> None:
    shared = ["parallel.tp_size=2", "parallel.dispatcher={kind: deepep}", "train.dtype=bfloat16"]
    load("configs/quickstart.yaml", [*shared, "parallel.micro_batch_size=128"], ExperimentConfig)


def test_the_double_refuses_what_the_library_asserts_against(ranks: Ranks) -> None:
    """Control: the tests above would fail by these."""
    assert ranks.run(2, misuse) == [7, 7]


def misuse() -> int:
    """Return how many wrong calls the double has refused."""
    group, refused = mesh_here(ep_size=2).ep, 0
    with doubled():
        import deep_ep  # type: ignore[import-not-found]

        buffer = deep_ep.ElasticBuffer(group.handle, num_max_tokens_per_rank=4, hidden=16, num_topk=1)
        x, index = torch.zeros(3, 16, dtype=torch.bfloat16), torch.tensor([[0], [2], [3]])
        given = {"topk_idx": index, "topk_weights": torch.ones(3, 1), "num_experts": 4}
        given["async_with_compute_stream"] = True
        here, _, _, handle, event = buffer.dispatch(x, **given)
        assert isinstance(handle, EPHandle) and len(here) and here.isnan().all()
        event.current_stream_wait()
        assert not here.isnan().any()
        wrong = [
            (buffer.dispatch, (x.float(),), given),
            (buffer.dispatch, (torch.zeros(16, 3, dtype=torch.bfloat16).T,), given),
            (buffer.dispatch, (torch.zeros(5, 16, dtype=torch.bfloat16),), given),
            (buffer.dispatch, (x,), {"handle": handle, "async_with_compute_stream": True}),
            (buffer.dispatch, (x,), {**given, "topk_weights": torch.ones(3, 1, dtype=torch.float64)}),
            (buffer.combine, (torch.zeros(len(here) + 1, 16, dtype=torch.bfloat16), handle), {}),
        ]
        for call, args, kwargs in wrong:
            with pytest.raises(AssertionError):
                call(*args, **kwargs)
            refused += 1
        with pytest.raises(AssertionError):
            event.current_stream_wait()
    return refused + 1


@pytest.mark.parametrize("kind", CONFIGS)
def test_one_rank_needs_no_library(kind: str) -> None:
    assert isinstance(CONFIGS[kind].build(Mesh.of_one(), 4), LocalDispatcher)
