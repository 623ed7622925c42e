"""A model of a step's time: a roofline of what is computed, and the time of every collective. Not a measurement.

computation   the larger of: operations one after the other, products and others at the speeds of the device; their
              sum on a CPU
exchanged     all-to-alls and all-gathers of rows: waited for
weights       gathers and reductions of weights and gradients: partly hidden behind computation
stages        sends between stages of a pipeline, and the time in which its ranks wait for it to fill and empty
"""

from collections.abc import Mapping
from dataclasses import dataclass

from trainer.plan.gpus import Gpu
from trainer.plan.links import Links, seconds_at
from trainer.plan.step_cost import Quantity, StepCost

_OF_WEIGHTS = ("allreduce", "allgather_base", "reduce_scatter_base", "broadcast")
"""Collectives that may overlap with computation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """Modelled seconds of the parts of a step."""

    computation: float
    exchanged: float
    weights: float
    hidden: float
    """Part of `weights` that passes during the computation."""
    stages: float = 0.0

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return self.computation + self.exchanged + self.weights - self.hidden + self.stages


def step_time(
    cost: StepCost, gpu: Gpu, *, ranks_per_node: int, links: Links | None = None, idle: float = 0.0
) -> StepTime:
    """Return the modelled time of a step whose ranks are numbered node by node.

    `idle` is the time that a pipeline's ranks wait for it to fill and empty, by that in which they work.
    """
    computation = _computation(cost.totals, gpu)
    exchanged = weights = stages = 0.0
    for key, calls in cost.totals.items():
        if key.unit != "calls" or key.ranks is None or calls <= 0:
            continue
        sent = cost.totals[Quantity("bytes", key.of, key.ranks)]
        messages = cost.totals[Quantity("messages", key.of, key.ranks)]
        if links is not None:
            seconds = calls * _measured(key, sent / calls, links)
        else:
            seconds = _modelled(key, calls, sent, messages, gpu, ranks_per_node)
        if key.of in _OF_WEIGHTS:
            weights += seconds
        elif key.of == "send":
            stages += seconds
        else:
            exchanged += seconds
    hidden = min(weights, computation) * gpu.reached.overlap
    stages += (computation + exchanged) * idle
    return StepTime(computation=computation, exchanged=exchanged, weights=weights, hidden=hidden, stages=stages)


def _computation(totals: Mapping[Quantity, float], gpu: Gpu) -> float:
    seconds = started = 0.0
    for key, value in totals.items():
        kind, _, dtype = key.of.partition(" ")
        if key.unit == "operations":
            started += value * gpu.reached.operation_s
        elif key.unit == "shard_calls":
            started += value * gpu.reached.shard_call_s
        elif key.unit == "moved":
            moving = value / (gpu.bandwidth * gpu.reached.memory)
            if kind == "products":
                flops = totals.get(Quantity("flops", key.of), 0)
                speed = gpu.flops.get(dtype, gpu.flops["float32"]) * gpu.reached.products
                moving = max(moving, flops / speed)
            seconds += moving
    return max(seconds, started) if gpu.reached.starts_ahead else seconds + started


def _modelled(key: Quantity, calls: float, sent: float, messages: float, gpu: Gpu, ranks_per_node: int) -> float:
    """Return the time of some collectives: bytes over the slower of both kinds of links, and latencies."""
    assert key.ranks is not None
    mine = key.ranks[0] // ranks_per_node
    size, here = len(key.ranks), sum(rank // ranks_per_node == mine for rank in key.ranks)
    reached = gpu.reached
    if here == size:
        return calls * reached.inside_s + messages * reached.message_s + sent / (gpu.inside * reached.links)
    # What a ring sends passes each kind of link; of an exchange the part for the ranks of the node stays inside.
    between = sent if key.of in _OF_WEIGHTS else sent * (size - here) / (size - 1)
    inside = sent if key.of in _OF_WEIGHTS else sent - between
    bytes_s = max(inside / (gpu.inside * reached.links), between / (gpu.between * reached.links))
    # Rings and trees go over nodes, an exchange sends to every rank by itself.
    number = calls * max(1, size / max(1, here)) if key.of in _OF_WEIGHTS else messages
    return calls * reached.between_s + number * reached.message_s + bytes_s


def _measured(key: Quantity, sent: float, links: Links) -> float:
    """Return the time of a collective on the measured ranks; a group of fewer takes as long."""
    assert key.ranks is not None
    size = len(key.ranks)
    if key.of.startswith("alltoall"):
        return seconds_at(links.curve("all_to_all"), sent * size / (size - 1))
    if key.of.startswith("allreduce"):
        return seconds_at(links.curve("all_reduce"), sent * size / (2 * (size - 1)))
    curve = links.curve("all_gather") if key.of.startswith("allgather") else ()
    curve = links.curve("reduce_scatter") if key.of.startswith("reduce_scatter") else curve
    if curve:
        return seconds_at(curve, sent * size / (size - 1))
    # Half of an all-reduce of the whole, in which a reduction and a gather follow each other.
    return seconds_at(links.curve("all_reduce"), sent * size / (size - 1)) / 2
