"""Load of each layer's experts: rows that a tracker draws over the steps as heat maps."""

from collections.abc import Mapping, Sequence
from typing import Any

_MOST_CELLS = 512
"""Most cells of a row; wandb has no more bins."""


def layer_loads(experts: Mapping[str, Any], moe_layers: Sequence[int]) -> dict[str, list[float]]:
    """Return for each MoE layer the load of each expert: its assignments over the mean of the layer, 1 when even.

    Of a layer with more experts than a row has cells, neighbours share one: then their mean load.

    Args:
        experts: a line of routing.jsonl.
        moe_layers: numbers of the layers that it counts, in order.
    """
    rows = zip(moe_layers, experts["counts"], strict=True)
    return {f"load/layer_{layer:02d}": _loads(counts) for layer, counts in rows}


def _loads(counts: list[int]) -> list[float]:
    per_cell = -(-len(counts) // _MOST_CELLS)
    cells = [counts[i : i + per_cell] for i in range(0, len(counts), per_cell)]
    mean = max(1, sum(counts)) / len(counts)
    return [round(sum(cell) / len(cell) / mean, 4) for cell in cells]
