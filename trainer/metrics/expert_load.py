"""Relative load of each layer's experts, which trackers draw over steps as heat maps."""

from collections.abc import Mapping, Sequence
from typing import Any

_MAX_CELLS = 512  # most cells of a row: the limit of wandb's histograms


def layer_loads(experts: Mapping[str, Any], moe_layers: Sequence[int]) -> dict[str, list[float]]:
    """Return the load of each expert of the layers `moe_layers`, which a line of routing.jsonl counts in this order.

    Load is an expert's assignments over the layer's mean, 1 when even. If a layer has more experts than a row has
    cells, neighbouring experts share a cell with their mean load.
    """
    rows = zip(moe_layers, experts["counts"], strict=True)
    return {f"load/layer_{layer:02d}": _loads(counts) for layer, counts in rows}


def _loads(counts: list[int]) -> list[float]:
    per_cell = -(-len(counts) // _MAX_CELLS)
    cells = [counts[i : i + per_cell] for i in range(0, len(counts), per_cell)]
    mean = max(1, sum(counts)) / len(counts)
    return [round(sum(cell) / len(cell) / mean, 4) for cell in cells]
