"""Law: micro-batches that overlap learn the same, and one is computed while the rows of the other travel."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.builders import make_batch, make_engine, make_packed_batch, share_of, tiny_model_config
from tests.laws.test_expert_parallel import MODELS, OTHER_ROUTERS
from tests.ranks import Ranks, mesh_here
from tests.registries import DISPATCHERS
from trainer.data.batches.batch import Batch
from trainer.distributed.flight_recorder import FlightRecorder, Operation
from trainer.distributed.rank_layout import Layout
from trainer.engine.native import NativeEngine
from trainer.moe.dispatch.registry import ExchangeOptions
from trainer.moe.layer import InFlight, MoE
from trainer.moe.stats import MoEStats
from trainer.parallel.config import ParallelConfig

STEPS, ROWS, SEQ_LEN = 3, 12, 8
ROUTERS = MODELS | OTHER_ROUTERS
DROPS = ROUTERS["bias_balanced, jitter, capacity"]


def _engine(
    layout: dict[str, Any],
    parallel: dict[str, Any],
    model: dict[str, Any],
    dtype: torch.dtype = torch.float64,
    recorder: FlightRecorder | None = None,
) -> NativeEngine:
    mesh = mesh_here(ranks_per_node=2, recorder=recorder, **layout)
    moe = {"num_experts": 8, "balance": {"coef": 0.1}, **model.get("moe", {})}
    config = tiny_model_config(moe, **{key: value for key, value in model.items() if key != "moe"})
    section = ParallelConfig.model_validate({**layout, **parallel})
    return make_engine(config, dtype=dtype, seed=5, grad_clip=0.5, mesh=mesh, parallel=section)


def _share(step: int, layout: Layout, num_pieces: int, *, is_packed: bool) -> list[Batch]:
    make = make_packed_batch if is_packed else make_batch
    return share_of(make(ROWS, SEQ_LEN, seed=step, first_sample=ROWS * step), layout, num_pieces)


def _train(engine: NativeEngine, num_pieces: int, *, is_packed: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the metrics of some steps, and this rank's slices of the state after them."""
    curve, moe = [], engine.moe_config
    assert moe is not None
    for step in range(STEPS):
        batches = _share(step, engine.mesh.layout, num_pieces, is_packed=is_packed)
        result = engine.train_step(batches, lr=3e-3, return_experts=moe.router.has_fixed_k)
        routing = result.routing
        assert routing is not None and routing.router_squares is not None
        curve.append([result.loss, result.balance_loss or 0.0, result.z_loss or 0.0, result.grad_norm])
        curve[-1] += [sum(result.extra_losses.values()), *routing.router_squares.tolist(), *routing.dropped.tolist()]
        curve[-1] += [*routing.counts.flatten().tolist(), *(float(e.double().mean()) for e in result.experts)]
    return torch.tensor(curve, dtype=torch.float64), {n: s.tensor for n, s in engine.state().slices.items()}


def differences(
    layout: dict[str, Any], parallel: dict[str, Any], model: dict[str, Any], num_pieces: int, dtype: torch.dtype
) -> tuple[float, list[str], bool]:
    """Return the largest difference between overlapped and other steps, what differs at all, and whether they learn."""
    found = []
    for overlap in ("none", "micro_batches"):
        engine = _engine(layout, {**parallel, "overlap": overlap}, model, dtype)
        found.append(_train(engine, num_pieces, is_packed=engine.model.config.document_mask))
    (curve, state), (overlapped, other) = found
    assert state.keys() == other.keys()
    apart = {name: float((other[name] - state[name]).abs().max()) for name in state if state[name].numel()}
    apart["curve"] = float((overlapped - curve).abs().max())
    return max(apart.values()), [name for name, by in apart.items() if by], bool(curve[-1, 0] != curve[0, 0])


def _learns_the_same(
    ranks: Ranks,
    world_size: int,
    layout: dict[str, Any],
    parallel: dict[str, Any],
    model: dict[str, Any],
    num_pieces: int = 3,
) -> None:
    for largest, _, learns in ranks.run(world_size, differences, layout, parallel, model, num_pieces, torch.float64):
        assert largest < 1e-9 and learns


@pytest.mark.one_in(4)
@pytest.mark.parametrize("name", ROUTERS)
def test_every_router_and_loss_learns_the_same(ranks: Ranks, name: str) -> None:
    moe = ROUTERS[name]
    if moe.get("num_experts", 8) < 2:
        pytest.skip("one expert is on one rank")
    _learns_the_same(ranks, 2, {"ep_size": 2}, {}, {"moe": moe})


@pytest.mark.one_in(2)
@pytest.mark.parametrize("kind", [kind for kind in DISPATCHERS if kind != "local"])
def test_every_dispatcher_learns_the_same(ranks: Ranks, kind: str) -> None:
    moe = {"capacity": {"factor": 1.0, "min": 1}, "router": {"kind": "top_k", "top_k_choices": [1, 2]}}
    chunks = {"chunks": 2} if issubclass(DISPATCHERS[kind], ExchangeOptions) else {}
    _learns_the_same(ranks, 4, {"ep_size": 4}, {"dispatcher": {"kind": kind, **chunks}}, {"moe": moe})


LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any], dict[str, Any], int]] = {
    "sharded": (4, {"ep_size": 2}, {"data": "shard"}, {"moe": DROPS}, 3),
    "sharded, keeping nothing, recomputed": (
        4,
        {"ep_size": 2},
        {"data": "shard", "shard_keeps": "nothing", "recompute": "block"},
        {"moe": {"num_shared_experts": 1}},
        2,
    ),
    "sharded, keeping weights, in chunks": (
        4,
        {"ep_size": 2, "shard_size": 2},
        {"data": "shard", "shard_keeps": "weights", "dispatcher": {"kind": "all_to_all", "chunks": 2}},
        {"moe": {"num_shared_experts": 1}},
        4,
    ),
    "sharded, outputs compared": (
        4,
        {"ep_size": 2},
        {"data": "shard"},
        {"moe": OTHER_ROUTERS["device balance, diversity"]},
        2,
    ),
    "copies of experts, sharded": (4, {"ep_size": 2}, {"data": "shard", "replicas": 1}, {"moe": DROPS}, 2),
    "copies of experts": (2, {"ep_size": 2}, {"replicas": 2, "placement": "round_robin"}, {}, 3),
    "recomputed experts": (2, {"ep_size": 2}, {"recompute": "experts"}, {"moe": {"num_shared_experts": 1}}, 2),
    "recomputed norms": (2, {"ep_size": 2}, {"recompute": "norms_and_activations"}, {}, 2),
    "every second block": (2, {"ep_size": 2}, {"recompute": {"every": 2}}, {}, 2),
    "a row budget": (2, {"ep_size": 2}, {"dispatcher": {"kind": "all_to_all", "row_budget": 1.0}}, {}, 3),
    "shared rows": (4, {"ep_size": 2, "cp_size": 2}, {}, {"moe": {"balance": {"coef": 0.1, "scope": "sequence"}}}, 2),
    "documents, a tied embedding, dense layers": (
        2,
        {"ep_size": 2},
        {},
        {"document_mask": True, "tie_embeddings": True, "num_layers": 5, "moe": {"every": 2, "num_shared_experts": 1}},
        5,
    ),
    "one micro-batch": (2, {"ep_size": 2}, {}, {}, 1),
}
"""Ranks, degrees, other options of `parallel`, model and micro-batches."""


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_learns_the_same(ranks: Ranks, name: str) -> None:
    _learns_the_same(ranks, *LAYOUTS[name])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_pair_is_the_same_bits(ranks: Ranks, dtype: torch.dtype) -> None:
    """The sum of two gradients has one order; in bfloat16 it is a sum in float32, as without overlap."""
    model = {"moe": {"num_shared_experts": 1, "z_loss_coef": 0.01}}
    for _, different, learns in ranks.run(2, differences, {"ep_size": 2}, {}, model, 2, dtype):
        assert different == [] and learns


class _Trace(FlightRecorder):
    """Writes down, in their order, exchanges that start or are awaited, and what is computed for which micro-batch."""

    def __init__(self, *, backward: Sequence[int]) -> None:
        """Begin; `backward` are the numbers of the micro-batches in the order of their backward passes."""
        super().__init__()
        self.events: list[tuple[str, int]] = []
        """What, and the number of the exchange or the micro-batch."""
        self._order = {"forward": range(len(backward)), "backward": backward}

    def note(self, name: str, group: str, sizes: Any) -> Operation:
        operation = super().note(name, group, sizes)
        if name == "all_to_all":
            self.events.append(("start", operation.number))
        return operation

    def wait_for(self, operation: Operation) -> None:
        super().wait_for(operation)
        if operation.name == "all_to_all":
            self.events.append(("wait", operation.number))

    def follow(self, module: nn.Module, part: str) -> None:
        """Write down the passes of a module."""
        left = {direction: list(order) for direction, order in self._order.items()}

        def computed(direction: str) -> None:
            self.events.append((f"{part} {direction}", left[direction].pop(0)))

        def after(_: nn.Module, inputs: Any, output: Tensor) -> None:
            computed("forward")
            output.register_hook(lambda _: computed("backward"))

        module.register_forward_hook(after)

    def follow_output(self, moe: MoE) -> None:
        """Write down whose gradient reaches the output of a layer: a stage may begin its backward pass there."""
        finish, left = moe.finish, list(self._order["backward"])

        def finished(computed: InFlight) -> tuple[Tensor, MoEStats]:
            out, stats = finish(computed)
            out.register_hook(lambda _: self.events.append(("begin", left.pop(0))))
            return out, stats

        moe.finish = finished  # type: ignore[method-assign]


def exchanges(
    overlap: str, layout: dict[str, Any] | None = None, num_pieces: int = 2
) -> list[tuple[int, list[tuple[str, int]]]]:
    """Return for each exchange of a step whose rows it has, and what is computed meanwhile; there are two layers."""
    numbers, layout = range(num_pieces), layout or {"ep_size": 2}
    trace = _Trace(backward=numbers if overlap == "none" else [number ^ 1 for number in numbers])
    model = {"moe": {"balance": {"coef": 0.0}}, "num_layers": 2 * layout.get("pp_size", 1)}
    engine = _engine(layout, {"overlap": overlap}, model, recorder=trace)
    for (_, block), moe in zip(engine.model.blocks.numbered(), engine.model.moe_layers(), strict=True):
        trace.follow(block.get_submodule("attention"), "attention")
        trace.follow(moe.experts, "experts")
        trace.follow_output(moe)
    if engine.passes.has_last:
        trace.follow(engine.model.norm, "loss")
    engine.train_step(_share(0, engine.mesh.layout, num_pieces, is_packed=False), lr=1e-3)
    found, events = [], trace.events
    for index, (what, number) in enumerate(events):
        if what == "start":
            owner = next(of for part, of in reversed(events[:index]) if part not in ("start", "wait"))
            meanwhile = events[index : events.index(("wait", number))]
            found.append((owner, [event for event in meanwhile if event[0] not in ("start", "wait", "begin")]))
    return found


def test_rows_of_one_micro_batch_travel_while_the_other_is_computed(ranks: Ranks) -> None:
    """Rows and weights go there, rows come back, and so do their gradients, in two layers for two micro-batches."""
    for found in ranks.run(2, exchanges, "micro_batches"):
        assert len(found) == 2 * 2 * 2 * 3
        assert all(computed and {of for _, of in computed} == {1 - owner} for owner, computed in found)
        hiding = {part for _, computed in found for part, _ in computed}
        assert hiding == {
            f"{part} {way}" for part in ("attention", "experts", "loss") for way in ("forward", "backward")
        }


def test_rows_travel_alone_without_overlap(ranks: Ranks) -> None:
    """The control of the law above."""
    for found in ranks.run(2, exchanges, "none"):
        assert len(found) == 2 * 2 * 2 * 3 and not any(computed for _, computed in found)
