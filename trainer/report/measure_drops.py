"""Measure which assignments are dropped at the capacity of training: by layer, domain and position in the row.

# L MoE layers, G domains, S positions of a row, A assignments.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from trainer.data.batches.batch import Batch
from trainer.engine.base import Engine
from trainer.models.routing_context import routing_context
from trainer.moe.capacity import limit_to_capacity
from trainer.moe.routing import RoutingOptions
from trainer.report.report_data import DropRates

MOST_RANGES = 16
"""Most ranges of positions."""


@torch.no_grad()
def count_drops(engine: Engine, batches: Sequence[Batch], num_domains: int) -> NDArray[np.int64]:
    """Return (L, 2, G, S): assignments of predicted tokens, and those of them that are dropped.

    The batches are micro-batches of training, and each layer's input is what earlier layers make of it with drops.
    """
    layers = engine.model.moe_layers()
    seq_len = engine.model.config.seq_len
    found = torch.zeros(len(layers), 2, num_domains * seq_len, dtype=torch.int64)
    options = RoutingOptions(counts_targets_only=True, return_router_outputs=True)
    for batch in batches:
        here = batch.to(engine.device)
        with engine.autocast():
            output = engine.model(here, options)
        context = routing_context(here, options)
        counted = here.target_mask.flatten().bool()
        cell = (here.domain * seq_len + here.position).flatten()
        for layer, (module, stats) in enumerate(zip(layers, output.moe, strict=True)):
            assert stats.routed is not None, "they are requested"
            decision = stats.routed.decision
            kept = limit_to_capacity(decision, module.capacity, context.of_layer(layer), salt=module.layer).kept
            asked = decision.kept & counted[decision.token_index] & (decision.expert_index < decision.num_experts)
            for row, chosen in enumerate((asked, asked & ~kept)):
                cells = cell[decision.token_index[chosen]]
                found[layer, row] += torch.bincount(cells, minlength=found.shape[-1]).cpu()
    return found.view(len(layers), 2, num_domains, seq_len).numpy()


def drop_rates(counts: NDArray[np.int64]) -> DropRates:
    """Return the drop rates of a layer from its counts (2, G, S)."""
    seq_len = counts.shape[-1]
    starts = np.unique(np.arange(MOST_RANGES) * seq_len // MOST_RANGES)
    asked, dropped = counts
    by_position = [np.add.reduceat(part.sum(0), starts) for part in (asked, dropped)]
    return DropRates(
        overall=float(dropped.sum() / max(1, asked.sum())),
        by_domain=_rates(asked.sum(1), dropped.sum(1)),
        by_position=_rates(*by_position),
        positions=tuple(starts.tolist()),
    )


def _rates(asked: NDArray[np.int64], dropped: NDArray[np.int64]) -> tuple[float | None, ...]:
    return tuple(d / a if a else None for a, d in zip(asked.tolist(), dropped.tolist(), strict=True))
