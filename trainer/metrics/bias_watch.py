"""Spread and pace of the routers' selection biases.

# L MoE layers, E experts.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def selection_bias(routers: Iterable[nn.Module]) -> Tensor | None:
    """Return the selection biases (L, E) of the routers of a model, or (L, E + 1); None if they have none."""
    biases = [bias for router in routers if isinstance(bias := getattr(router, "bias", None), Tensor)]
    return torch.stack(biases) if biases else None


class BiasWatch:
    """Compares the biases of a logged step with those of the one before."""

    def __init__(self) -> None:
        self._before: tuple[int, Tensor] | None = None

    def look(self, step: int, bias: Tensor | None) -> dict[str, list[float | None]]:
        """Return the keys of routing.jsonl, given the biases (L, E) on the host; nothing if there are none.

        Returns:
            bias_span: largest minus smallest bias of each layer.
            bias_change: largest change of a bias per step since the line before; null in the first line.
        """
        if bias is None:
            return {}
        before, self._before = self._before, (step, bias)
        changes: list[float | None] = [None] * len(bias)
        if before is not None and step > before[0]:
            changes = ((bias - before[1].to(bias.dtype)).abs().amax(-1) / (step - before[0])).tolist()
        return {"bias_span": (bias.amax(-1) - bias.amin(-1)).tolist(), "bias_change": changes}

    def record(self) -> dict[str, Any]:
        """Return the state for a checkpoint, as JSON values."""
        return {} if self._before is None else {"step": self._before[0], "bias": self._before[1].tolist()}

    def restore(self, record: Mapping[str, Any]) -> None:
        """Restore a `record`; an empty one begins anew."""
        self._before = (record["step"], torch.tensor(record["bias"], dtype=torch.float64)) if record else None
