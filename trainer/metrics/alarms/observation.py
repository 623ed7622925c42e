"""Numbers of one logged step that alarms look at, as metrics.jsonl and routing.jsonl have them. Imports no torch.

# L MoE layers, E experts.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

Numbers = Sequence[float | None]
"""(L,) one number of each MoE layer; None where it is unknown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """One logged step."""

    step: int
    loss: float
    lr: float
    grad_norm: float
    experts_per_token: float = 0.0
    """k, mean over layers; 0 for a dense model."""
    counts: Sequence[Sequence[float]] = ()
    """(L, E) assignments before drops."""
    entropy: Numbers = ()
    """Nats per token, of the router probabilities."""
    token_information: Numbers = ()
    """Nats: entropy of the mean probabilities minus `entropy`."""
    prob_span: Numbers = ()
    """Largest minus smallest mean probability of an expert."""
    router_grad_norm: Numbers = ()
    bias_span: Numbers = ()
    """Largest minus smallest selection bias."""
    bias_change: Numbers = ()
    """Largest change of a selection bias per step."""
    slowest_rank: int | None = None
    slowest_rank_ratio: float | None = None
    """Own time of the slowest rank over the median rank's."""

    @classmethod
    def of(cls, record: Mapping[str, Any], experts: Mapping[str, Any] | None) -> Self | None:
        """Return the observation of a line of metrics.jsonl and of routing.jsonl; None if the step was not finite."""
        numbers = [record.get(key) for key in ("loss", "lr", "grad_norm")]
        if not all(isinstance(number, int | float) and math.isfinite(number) for number in numbers):
            return None
        lines, (loss, lr, grad_norm) = experts or {}, map(float, numbers)  # type: ignore[arg-type]
        keys = ("entropy", "token_information", "prob_span", "router_grad_norm", "bias_span", "bias_change")
        return cls(
            step=int(record["step"]),
            loss=loss,
            lr=lr,
            grad_norm=grad_norm,
            experts_per_token=record.get("experts_per_token") or 0.0,
            counts=lines.get("counts", ()),
            **{key: lines.get(key, ()) for key in keys},
            slowest_rank=record.get("slowest_rank"),
            slowest_rank_ratio=record.get("slowest_rank_ratio"),
        )

    def imbalance(self, layer: int) -> float:
        """Return the load of the busiest expert of a layer over the mean; 1 if the layer had no token."""
        counts = self.counts[layer]
        return max(counts) * len(counts) / total if (total := sum(counts)) else 1.0


def of_layer(numbers: Numbers, layer: int) -> float | None:
    """Return the number of a layer; None if it is unknown."""
    return numbers[layer] if layer < len(numbers) else None
