"""Predict from a trace: drops, rows of each rank, what is sent, and a step's time, at other settings.

# L MoE layers, E experts, G ranks of an expert-parallel group, N steps.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Final

import torch
from torch import Tensor

from trainer.moe.expert_places import ExpertPlaces
from trainer.parallel.expert_placement import ExpertPlacement
from trainer.routing_record.trace_facts import TraceFacts
from trainer.what_if.dispatch_traffic import SendingDispatcher, copies_to_ranks, rows_to_ranks, sent_rows
from trainer.what_if.predicted_decision import DecidedPass
from trainer.what_if.traced_passes import Trace, TracedPass

_WITHOUT_ACTIVATIONS: Final = ("hash", "random", "round_robin")
"""Routers that decide alike whatever the layers before them did."""
_MASTER_BYTES: Final = 4
"""Least bytes of a weight that is sent to copies; bfloat16 where FSDP2 has gathered it, which a trace does not know."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """Speeds of a rank, which the time of a step is modelled with."""

    flops: float
    """FLOP/s."""
    bandwidth: float
    """Bytes per second that a rank sends."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PlacedExperts:
    """Where experts are."""

    name: str
    placement: ExpertPlacement

    @property
    def num_ranks(self) -> int:
        """G."""
        return self.placement.num_ranks

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.placement.owners)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayoutOptions:
    """Layouts whose load and traffic are predicted."""

    places: Sequence[PlacedExperts] = ()
    dispatchers: Sequence[SendingDispatcher] = ()
    hardware: Hardware | None = None
    """None: no time is modelled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutPrediction:
    """Load and traffic of a layout, for the rows that a capacity keeps."""

    placement: str
    ep_size: int
    rows_per_rank: list[list[int]]
    """(L, G) rows that the experts of each rank compute, over all steps."""
    busiest_over_mean: float
    """Rows of the busiest rank over the mean of ranks, in each step and layer; mean over both."""
    worst_busiest_over_mean: float
    bytes_per_step: dict[str, float]
    """Bytes that a rank sends in a step's forward pass, by dispatcher; mean over ranks and steps."""
    bytes_of_busiest: dict[str, float]
    """The same of the rank that sends most, in each layer."""
    step_ms: dict[str, float] = field(default_factory=dict)
    """Modelled milliseconds of a training step, by dispatcher; empty without `Hardware`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """Drops and layouts under a capacity and a k."""

    capacity: float | None
    top_k: int
    assignments: list[int]
    """(L,) of counted tokens, before drops."""
    dropped: list[int]
    """(L,) of them, over capacity."""
    exact_layers: int
    """The first so many MoE layers are as an evaluation would have them; all of them, if it was one."""
    estimate: list[int] | None = None
    """(L,) drops by the trace alone, beside those of an evaluation."""
    layouts: list[LayoutPrediction] = field(default_factory=list)

    @property
    def drop_rate(self) -> float:
        """Dropped over all assignments."""
        return sum(self.dropped) / max(1, sum(self.assignments))


@dataclass(slots=True, kw_only=True, eq=False)
class _Traffic:
    """Rows and copies of all steps under one placement."""

    place: PlacedExperts
    rows: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    """(L, G, G) by domain and step: from each rank for the experts of each."""
    copies: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    owner: list[Tensor] = field(init=False)
    """For each layer, (P,) rank of each place."""
    places: list[list[ExpertPlaces]] = field(init=False)
    """For each layer, the places by which each rank sends."""

    def __post_init__(self) -> None:
        """Number the places as training does."""
        placement, ranks = self.place.placement, range(self.place.num_ranks)
        self.owner, self.places = [], []
        for layer in range(self.place.num_layers):
            held = [sum(map(len, placement.held(layer, rank))) for rank in ranks]
            self.owner.append(torch.arange(len(held)).repeat_interleave(torch.tensor(held)))
            places = placement.places(layer)
            self.places.append([ExpertPlaces(places, first_turn=rank) for rank in ranks])

    def cells(self, traced: TracedPass) -> tuple[Tensor, Tensor]:
        """Return (L, G) views of what the sender of a pass sends: each rank of a step takes one pass."""
        layers, size = self.place.num_layers, self.place.num_ranks
        key, sender = (traced.domain, traced.number // size), traced.number % size
        for sums in (self.rows, self.copies):
            sums.setdefault(key, torch.zeros(layers, size, size, dtype=torch.int64))
        return self.rows[key][:, sender], self.copies[key][:, sender]


def expert_loads(trace: Trace) -> Tensor:
    """Return (L, E) the assignments of the model's own k, over all tokens of a trace."""
    loads = torch.zeros(len(trace.model.moe_layers), trace.model.num_experts, dtype=torch.int64)
    for traced in trace.passes():
        chosen = traced.listed[traced.context.valid][..., : trace.model.top_k]  # (n, L, k)
        for layer, load in enumerate(loads):
            load += chosen[:, layer].flatten().bincount(minlength=trace.model.num_choices)[: len(load)]
    return loads


def predict(
    trace: Trace,
    passes: Iterable[DecidedPass],
    *,
    capacity: float | None,
    top_k: int,
    is_evaluated: bool,
    layouts: LayoutOptions,
) -> Prediction:
    """Sum up what a capacity and a k do with the tokens of a trace, under several placements."""
    layers = len(trace.model.moe_layers)
    assignments, dropped, lost = [0] * layers, [0] * layers, [0] * layers  # lost: of all tokens, also not counted
    traffic, static_rows = [_Traffic(place=place) for place in layouts.places], None
    for each in passes:
        traced = each.traced
        cells = [one.cells(traced) for one in traffic]
        for layer, decision in enumerate(each.decisions):
            static_rows = decision.capacity
            is_counted = traced.counted[decision.token_index]
            assignments[layer] += int((is_counted & (decision.expert_index < decision.num_experts)).sum())
            dropped[layer] += each.dropped(layer, traced.counted)
            lost[layer] += each.dropped(layer, traced.context.valid)
            for one, (rows, copies) in zip(traffic, cells, strict=True):
                owner, size = one.owner[layer], one.place.num_ranks
                placed = one.places[layer][traced.number % size].placed(decision)
                rows[layer] += rows_to_ranks(placed, owner, size)
                copies[layer] += copies_to_ranks(placed, owner, size)
    has_own_inputs = is_evaluated or trace.model.router in _WITHOUT_ACTIVATIONS
    return Prediction(
        capacity=capacity,
        top_k=top_k,
        assignments=assignments,
        dropped=dropped,
        exact_layers=layers if has_own_inputs else _unchanged(lost) if top_k == trace.model.top_k else 1,
        layouts=[_layout(trace, one, layouts, static_rows) for one in traffic],
    )


def _unchanged(lost: Sequence[int]) -> int:
    """Return how many layers have the input of the trace: the first one, and those before which nothing was dropped."""
    return next((layer + 1 for layer, number in enumerate(lost) if number), len(lost))


def _layout(trace: Trace, traffic: _Traffic, options: LayoutOptions, static_rows: int | None) -> LayoutPrediction:
    """Sum up what a layout does."""
    facts, place = trace.facts, traffic.place
    rows, copies = torch.stack(list(traffic.rows.values())), torch.stack(list(traffic.copies.values()))  # (N, L, G, G)
    at_rank, tokens = rows.sum(2), facts.rows_per_pass * facts.row_length  # (N, L, G)
    busiest = at_rank.amax(-1) / at_rank.double().mean(-1).clamp(min=1 / place.num_ranks)  # (N, L)
    sent: dict[str, Tensor] = {}  # (N, L, G) rows by dispatcher, then bytes
    for dispatcher in options.dispatchers:
        of_steps = [
            [
                sent_rows(dispatcher, *parts, tokens=tokens, capacity=static_rows)
                for parts in zip(*step, traffic.owner, strict=True)
            ]
            for step in zip(rows, copies, strict=True)
        ]
        sent[dispatcher] = torch.stack([torch.stack(layers) for layers in of_steps])
    lent = _lent_bytes(place.placement, facts)  # (L, G)
    sent = {name: rows * facts.d_model * facts.value_bytes + lent for name, rows in sent.items()}
    hardware = options.hardware
    times = {} if hardware is None else {name: _step_ms(trace, at_rank, s, hardware) for name, s in sent.items()}
    return LayoutPrediction(
        placement=place.name,
        ep_size=place.num_ranks,
        rows_per_rank=at_rank.sum(0).tolist(),
        busiest_over_mean=float(busiest.mean()),
        worst_busiest_over_mean=float(busiest.max()),
        bytes_per_step={name: float(s.sum(1).double().mean()) for name, s in sent.items()},
        bytes_of_busiest={name: float(s.amax(-1).sum(1).double().mean()) for name, s in sent.items()},
        step_ms=times,
    )


def _lent_bytes(placement: ExpertPlacement, facts: TraceFacts) -> Tensor:
    """Return (L, G) bytes of the experts' matrices, as masters, that each rank sends to those with copies, forward."""
    lent = torch.zeros(len(placement.owners), placement.num_ranks, dtype=torch.int64)
    for of_layer, owner, copies in zip(lent, placement.owners, placement.copies, strict=bool(placement.copies)):
        for expert in chain.from_iterable(copies):
            of_layer[owner[expert]] += 1
    return lent * (facts.expert_flops // 2) * max(_MASTER_BYTES, facts.value_bytes)


def _step_ms(trace: Trace, at_rank: Tensor, sent: Tensor, hardware: Hardware) -> float:
    """Return a training step's modelled milliseconds, mean over steps.

    Forward and backward take three times the forward's FLOPs and send twice its rows. Each layer waits for its busiest
    rank and for the rank that sends most; nothing overlaps, and messages have no latency.
    """
    facts = trace.facts
    tokens = facts.rows_per_pass * facts.row_length
    flops = 3 * (at_rank.amax(-1).sum(1).double() * facts.expert_flops + tokens * facts.other_flops)  # (N,)
    sent_bytes = 2 * sent.amax(-1).sum(1).double()
    return float((flops / hardware.flops + sent_bytes / hardware.bandwidth).mean()) * 1e3
