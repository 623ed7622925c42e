"""Measure how far a model's routers are from the optimal choice, while it trains.

The optimum is that of a linear programme (`evaluation/routing_optimum.py`), row by row, within the layer's capacity, or
a fair share where there is none. The rows are of held-out text and the same at every step, so that steps can be
compared; the routers decide as in training.

# L MoE layers, E experts, T tokens.
"""

import functools
import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from trainer.data.batches.batch import Batch
from trainer.data.batches.stream import evaluation_batches
from trainer.data.config import Packing
from trainer.data.corpus import Corpus
from trainer.distributed.collective_errors import barrier_gather, raise_together
from trainer.distributed.collectives import Group
from trainer.engine.base import Engine
from trainer.evaluation.routing_optimum import Measured, measure
from trainer.moe.capacity import expert_capacity
from trainer.moe.config import MoEConfig
from trainer.moe.routing import RouterOutput, RoutingOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingGap:
    """The choices of some rows beside the best ones."""

    layers: Sequence[Measured]
    """L sums over the rows."""
    prices: Sequence[list[float]]
    """(L, E) what room at an expert is worth, mean over rows, less the mean over experts; (L, E + 1) with null
    experts, whose room has no end and is worth nothing."""
    bias: Sequence[list[float]] | None
    """The learned selection bias, less its mean, in the same columns; its negative is what the router takes for the
    price."""

    def record(self) -> dict[str, float]:
        """Return the keys of metrics.jsonl."""
        whole = functools.reduce(operator.add, self.layers)
        record = {
            "routing_gap": whole.gap,
            "routing_gap/drop_rate": whole.drop_rate,
            "routing_gap/optimum_drop_rate": whole.optimum_drop_rate,
            "routing_gap/optimum": whole.optimum / max(1, whole.wanted),
        }
        return record | {f"routing_gap/layer_{i:02d}": layer.gap for i, layer in enumerate(self.layers)}

    def experts(self) -> dict[str, Any]:
        """Return the keys of routing.jsonl."""
        found: dict[str, Any] = {"prices": self.prices}
        return found if self.bias is None else {**found, "bias": self.bias}


def routing_gap(
    engine: Engine, batches: Iterable[Batch], config: MoEConfig, *, seed: int, world: Group
) -> RoutingGap | None:
    """Compare the choices for some rows with the best; None if the routers score nothing.

    Every rank must call it, with the same rows. Each routes all of them and solves its share of the programmes; nothing
    hangs on how many ranks there are then.

    Args:
        engine: whose model.
        batches: the rows.
        config: the `model.moe` section.
        seed: of the noise, as in training.
        world: all ranks.
    """
    options = RoutingOptions(noise_seed=seed, return_router_outputs=True)
    solved: list[tuple[Measured, list[float]]] = []  # of this rank's part of all pairs of row and layer
    number = 0
    with raise_together(world):
        for batch in batches:
            here = batch.to(engine.model.embedding.weight.device)
            with torch.no_grad(), engine.autocast():
                output = engine.model(here, options)
            routed = [stats.routed for stats in output.moe if stats.routed is not None]
            if any(of_layer.scores is None and of_layer.probs is None for of_layer in routed):
                return None
            for row in [row for row in range(len(here.valid)) if here.valid[row].any()]:
                for of_layer in routed:
                    if number % world.size == world.index:
                        solved.append(_of_row(of_layer, here.valid, row, config))
                    number += 1
    parts = barrier_gather(world, [(asdict(measured), prices) for measured, prices in solved])
    found = [parts[i % world.size][i // world.size] for i in range(number)]
    everything = [(Measured(**measured), prices) for measured, prices in found]
    num_layers = len(engine.model.moe_layers())
    by_layer = [everything[layer::num_layers] for layer in range(num_layers)]
    return RoutingGap(
        layers=[functools.reduce(operator.add, (measured for measured, _ in layer)) for layer in by_layer],
        prices=[_centred(torch.tensor([prices for _, prices in layer]).mean(0)) for layer in by_layer],
        bias=_biases(engine),
    )


def held_out_rows(
    corpus: Corpus, *, packing: Packing, seq_len: int, rows_of_a_domain: int, batch_size: int
) -> Iterator[Batch]:
    """Yield evenly spaced rows of every domain's held-out text, `batch_size` of them at once."""
    for domain in range(len(corpus.domains)):
        yield from evaluation_batches(
            corpus,
            domain,
            packing=packing,
            seq_len=seq_len,
            batch_size=min(rows_of_a_domain, batch_size),
            max_tokens=rows_of_a_domain * seq_len,
        )


def _of_row(routed: RouterOutput, valid: Tensor, row: int, config: MoEConfig) -> tuple[Measured, list[float]]:
    """Measure one layer's choice for a row; return it with the experts' prices.

    Null experts are what they are to the router: choices like others, with room for every token.
    """
    decision, num_experts = routed.decision, config.num_experts
    scores = routed.probs if routed.scores is None else routed.scores
    assert scores is not None
    chosen = torch.zeros_like(scores, dtype=torch.bool)  # (T, E + n)
    chosen[decision.token_index[decision.kept], decision.expert_index[decision.kept]] = True
    mine = valid[row]
    scores = scores.reshape(*valid.shape, -1)[row, mine].cpu()
    chosen = chosen.view(*valid.shape, -1)[row, mine].cpu()
    # The programme's k is the router's, or where a token's number is its own, the mean, rounded.
    top_k = getattr(config.router, "top_k", None) or max(1, round(float(chosen.sum()) / len(chosen)))
    limit = config.capacity
    if limit.factor is not None:  # padding counts in what a capacity is sized by
        room = expert_capacity(top_k * valid.shape[1], num_experts, factor=limit.factor, minimum=limit.min)
    else:
        choices = scores.shape[1]
        room = expert_capacity(
            top_k * len(scores), choices, factor=getattr(config.router, "capacity_factor", 1.0), minimum=0
        )
    room, num_free = min(len(scores), room), scores.shape[1] - num_experts
    measured, best = measure(scores, chosen, top_k=top_k, room=room, num_free=num_free)
    return measured, best.prices[: num_experts + (num_free > 0)].tolist()


def _biases(engine: Engine) -> list[list[float]] | None:
    biases = [getattr(layer.router, "bias", None) for layer in engine.model.moe_layers()]
    return [_centred(bias) for bias in biases if isinstance(bias, Tensor)] or None


def _centred(values: Tensor) -> list[float]:
    """Only differences between experts mean anything: all prices together can rise without changing a choice."""
    return [round(float(value), 6) for value in values.double() - values.double().mean()]
