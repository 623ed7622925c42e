"""Measure during training how far a model's routers are from the optimal choice (`evaluation/routing_optimum.py`).

The optimum is per sequence, within the layer's capacity or, without one, a fair share. The sequences are held-out text,
the same at every step, so that steps can be compared; the routers decide as in training.

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
from trainer.data.batches.evaluation import batches_of_all_domains
from trainer.data.config import Packing
from trainer.data.corpus import Corpus
from trainer.distributed.collective_errors import barrier_gather, raise_together
from trainer.distributed.collectives import Group
from trainer.engine.base import Engine
from trainer.evaluation.routing_optimum import Optimality, measure_optimality
from trainer.metrics.bias_watch import selection_bias
from trainer.moe.capacity import expert_capacity
from trainer.moe.config import MoEConfig
from trainer.moe.routing import RouterOutput, RoutingOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingGap:
    """Routing of some held-out sequences compared with the optimum."""

    layers: Sequence[Optimality]
    """L sums over the sequences."""
    prices: Sequence[list[float]]
    """(L, E) value of one more place at an expert, mean over sequences, minus the mean over experts; (L, E + 1) with
    null experts, whose price is 0."""
    bias: Sequence[list[float]] | None
    """The learned selection bias minus its mean, in the same columns; its negative estimates the price."""

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
        return {"prices": self.prices} | ({} if self.bias is None else {"bias": self.bias})


def routing_gap(
    engine: Engine, batches: Iterable[Batch], config: MoEConfig, *, seed: int, world: Group
) -> RoutingGap | None:
    """Compare the routing of some sequences with the optimum; None if the routers compute no scores.

    Collective, with the same sequences, and the seed of training's noise, on all ranks. Each rank routes all sequences
    and solves its share of the programmes, so the result does not depend on the number of ranks.
    """
    options = RoutingOptions(noise_seed=seed, return_router_outputs=True)
    solved: list[tuple[Optimality, list[float]]] = []  # this rank's share of all (sequence, layer) pairs
    number = 0
    with raise_together(world):
        for batch in batches:
            on_device = batch.to(engine.model.device)
            with torch.no_grad(), engine.autocast():
                output = engine.model(on_device, options)
            outputs = [stats.routed for stats in output.moe if stats.routed is not None]
            if any(one.scores is None and one.probs is None for one in outputs):
                return None
            for row in on_device.valid.any(1).nonzero().flatten().tolist():
                for one in outputs:
                    if number % world.size == world.index:
                        solved.append(_solve(one, on_device.valid, row, config))
                    number += 1
    parts = barrier_gather(world, [(asdict(optimality), prices) for optimality, prices in solved])
    gathered = [parts[i % world.size][i // world.size] for i in range(number)]
    results = [(Optimality(**optimality), prices) for optimality, prices in gathered]
    routers = [layer.router for layer in engine.model.moe_layers()]
    by_layer = [results[layer :: len(routers)] for layer in range(len(routers))]
    bias = selection_bias(routers)
    return RoutingGap(
        layers=[functools.reduce(operator.add, (optimality for optimality, _ in layer)) for layer in by_layer],
        prices=[_centred(torch.tensor([prices for _, prices in layer]).mean(0)) for layer in by_layer],
        bias=None if bias is None else [_centred(of_layer) for of_layer in bias],
    )


def held_out_rows(
    corpus: Corpus, *, packing: Packing, seq_len: int, rows_of_a_domain: int, batch_size: int
) -> Iterator[Batch]:
    """Yield evenly spaced rows of every domain's held-out text, at most `batch_size` per batch."""
    return batches_of_all_domains(
        corpus,
        packing=packing,
        seq_len=seq_len,
        batch_size=min(rows_of_a_domain, batch_size),
        max_tokens=rows_of_a_domain * seq_len,
    )


def _solve(output: RouterOutput, valid: Tensor, row: int, config: MoEConfig) -> tuple[Optimality, list[float]]:
    """Compare one layer's routing of a sequence with the optimum; return it with the experts' prices.

    Null experts are choices like others, without a capacity limit.
    """
    decision, num_experts = output.decision, config.num_experts
    scores = output.probs if output.scores is None else output.scores
    assert scores is not None, "routing_gap returns None for routers without scores"
    chosen = torch.zeros_like(scores, dtype=torch.bool)  # (T, E + n)
    chosen[decision.token_index[decision.kept], decision.expert_index[decision.kept]] = True
    is_token = valid[row]
    scores = scores.reshape(*valid.shape, -1)[row, is_token].cpu()
    chosen = chosen.view(*valid.shape, -1)[row, is_token].cpu()
    # The programme's k is the router's, or the rounded mean where tokens choose their own number.
    top_k = getattr(config.router, "top_k", None) or max(1, round(float(chosen.sum()) / len(chosen)))
    limit = config.capacity
    if limit.factor is not None:  # sized by the whole sequence, padding included
        capacity = expert_capacity(top_k * valid.shape[1], num_experts, factor=limit.factor, minimum=limit.min)
    else:
        factor = getattr(config.router, "capacity_factor", 1.0)
        capacity = expert_capacity(top_k * len(scores), scores.shape[1], factor=factor, minimum=0)
    capacity, num_uncapped = min(len(scores), capacity), scores.shape[1] - num_experts
    optimality, best = measure_optimality(scores, chosen, top_k=top_k, capacity=capacity, num_uncapped=num_uncapped)
    return optimality, best.prices[: num_experts + (num_uncapped > 0)].tolist()


def _centred(values: Tensor) -> list[float]:
    """Subtract the mean: only differences between experts affect a choice."""
    return [round(float(value), 6) for value in values.double() - values.double().mean()]
