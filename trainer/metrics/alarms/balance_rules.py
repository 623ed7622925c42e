"""Alarms about the load of experts: collapse, dead experts, an imbalance that grows. Import no torch.

# L MoE layers, E experts, k experts per token.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from trainer.metrics.alarms.config import AlarmsConfig
from trainer.metrics.alarms.observation import Observation, of_layer
from trainer.metrics.alarms.symptom import Symptom, TrainingFacts, severity_below

_FEWEST_EXPECTED = 20.0
"""Assignments of an even share below which an expert may be without any by chance."""
_GROWTH_STEPS = 60
_NEAR = 0.95
"""Share of the highest imbalance of these steps below which it falls already."""


def imbalance_limit(config: AlarmsConfig, observation: Observation, layer: int) -> float:
    """Return the load of the busiest expert over the mean from which it counts; infinite if that is switched off."""
    if config.imbalance is None:
        return math.inf
    most = len(observation.counts[layer]) / max(1.0, observation.experts_per_token)
    return min(config.imbalance, (1 + most) / 2) if most > 1 else math.inf


def collapsed_layers(observation: Observation, config: AlarmsConfig, facts: TrainingFacts) -> Iterator[Symptom]:
    """Yield the layers where few experts take nearly all tokens."""
    k = max(1.0, observation.experts_per_token)
    for layer, counts in enumerate(observation.counts):
        total, spare = sum(counts), len(counts) - k
        if config.collapse is None or not facts.learns_routing or spare < 0.5 or not total:
            continue
        used = math.exp(-math.fsum(c / total * math.log(c / total) for c in counts if c))
        share = max(0.0, (used - k) / spare)
        if share < config.collapse:
            yield Symptom(
                alarm="collapse",
                layer=facts.layers[layer],
                value=share,
                threshold=config.collapse,
                text=f"nearly all tokens go to {used:.1f} of {len(counts)} experts, at {k:.3g} a token",
                severity=severity_below(share, config.collapse),
            )


class DeadExperts:
    """Finds experts that got next to no tokens in all logged steps of the last `patience` steps."""

    def __init__(self, config: AlarmsConfig, facts: TrainingFacts) -> None:
        self._config, self._facts = config, facts
        self._since: dict[str, list[int]] = {}
        """First step without tokens and logged steps since, by "layer.expert"."""

    def find(self, observation: Observation) -> Iterator[Symptom]:
        """Yield the layers that have dead experts."""
        limit, step, patience = self._config.dead_expert, observation.step, self._config.patience
        if limit is None or not self._facts.learns_routing:
            return
        for layer, counts in enumerate(observation.counts):
            even = sum(counts) / len(counts)
            if even < _FEWEST_EXPECTED:
                continue  # nothing is known about its experts
            for expert, count in enumerate(counts):
                key = f"{layer}.{expert}"
                if count < limit * even:
                    self._since.setdefault(key, [step, 0])[1] += 1
                else:
                    self._since.pop(key, None)
            dead = [e for e in range(len(counts)) if self._is_dead(f"{layer}.{e}", step - patience)]
            if dead:
                since = min(self._since[f"{layer}.{e}"][0] for e in dead)
                names = ", ".join(map(str, dead[:8])) + (", ..." if len(dead) > 8 else "")
                yield Symptom(
                    alarm="dead_experts",
                    layer=self._facts.layers[layer],
                    value=len(dead),
                    threshold=limit,
                    text=f"{len(dead)} of {len(counts)} experts ({names}) got less than {100 * limit:g} % of an even "
                    f"share for {step - since} steps",
                    severity=float(len(dead)),
                    is_lasting=True,
                    since=since,
                    experts=dead,
                )

    def _is_dead(self, key: str, before: int) -> bool:
        since, lines = self._since.get(key, (0, 0))
        return lines >= 3 and since <= before

    def record(self) -> dict[str, Any]:
        """Return the state as JSON values."""
        return {"since": self._since}

    def restore(self, record: Mapping[str, Any]) -> None:
        """Restore a `record`."""
        self._since = {key: list(value) for key, value in record.get("since", {}).items()}


class ImbalanceGrowth:
    """Finds layers whose imbalance rises from third to third of the last 60 steps."""

    def __init__(self, config: AlarmsConfig, facts: TrainingFacts) -> None:
        self._config, self._facts = config, facts
        self._seen: list[tuple[int, list[float]]] = []
        """Steps, and the imbalance of each layer (L,)."""

    def find(self, observation: Observation) -> Iterator[Symptom]:
        """Yield the layers whose imbalance grows."""
        growth, step = self._config.imbalance_growth, observation.step
        if growth is None or not self._facts.learns_routing:
            return
        now = [observation.imbalance(layer) for layer in range(len(observation.counts))]
        # One step more than the window, so that it is full although steps between two lines are not seen.
        self._seen = [seen for seen in self._seen if seen[0] >= step - 2 * _GROWTH_STEPS] + [(step, now)]
        inside = [seen for seen in self._seen if seen[0] > step - _GROWTH_STEPS]
        if len(inside) < 6 or step - self._seen[0][0] < _GROWTH_STEPS - 1:
            return
        third = len(inside) // 3
        for layer in range(len(now)):
            values = [imbalances[layer] for _, imbalances in inside]
            means = [math.fsum(part) / len(part) for part in (values[:third], values[third:-third], values[-third:])]
            is_rising = means[0] < means[1] < means[2] and means[2] >= growth * means[0]
            goes_back = values[-1] < _NEAR * max(values)
            if is_rising and not goes_back and means[2] >= imbalance_limit(self._config, observation, layer):
                yield Symptom(
                    alarm="imbalance_growth",
                    layer=self._facts.layers[layer],
                    value=means[2] / means[0],
                    threshold=growth,
                    text=f"the busiest expert's load rose from {means[0]:.2f} to {means[2]:.2f} times the mean in "
                    f"{_GROWTH_STEPS} steps",
                    severity=means[2],
                    is_lasting=not self._has_moving_bias(observation, layer),
                    since=step - _GROWTH_STEPS,
                )

    def _has_moving_bias(self, observation: Observation, layer: int) -> bool:
        """Return whether a selection bias will even out a jump of the load, so that one line of growth says nothing."""
        change, steps = of_layer(observation.bias_change, layer), self._config.bias_steps
        return change is not None and steps is not None and change * steps >= 1

    def record(self) -> dict[str, Any]:
        """Return the state as JSON values."""
        return {"seen": [list(seen) for seen in self._seen]}

    def restore(self, record: Mapping[str, Any]) -> None:
        """Restore a `record`."""
        self._seen = [(int(step), list(values)) for step, values in record.get("seen", [])]
