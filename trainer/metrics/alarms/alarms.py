"""Alarms of a training: rules over logged numbers, and what rings, rings again and has ended. Imports no torch."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from trainer.metrics.alarms.advice import advice
from trainer.metrics.alarms.balance_rules import DeadExperts, ImbalanceGrowth, collapsed_layers
from trainer.metrics.alarms.config import AlarmsConfig
from trainer.metrics.alarms.observation import Observation
from trainer.metrics.alarms.progress_rules import LossPlateau, slow_rank
from trainer.metrics.alarms.router_rules import router_symptoms
from trainer.metrics.alarms.symptom import AlarmName, Symptom, TrainingFacts, place_of

_FEWEST_LINES = 3
_WORSE = 2.0
"""Growth of the severity with which an alarm that goes on is shown again, and fall with which it goes by itself."""

AlarmKey = tuple[AlarmName, int | None, int | None]
"""Alarm, layer and rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AlarmEvent:
    """A line of alarms.jsonl: an alarm rings, rings again or has ended."""

    step: int
    state: Literal["rings", "again", "ended"]
    alarm: AlarmName
    layer: int | None
    rank: int | None
    message: str
    value: float | None = None
    threshold: float | None = None
    advice: str = ""
    since: int | None = None
    """First step of the condition."""

    def record(self) -> dict[str, Any]:
        """Return the line as JSON values."""
        value = self.value if self.value is not None and math.isfinite(self.value) else None
        where = {"layer": self.layer} | ({} if self.rank is None else {"rank": self.rank})
        return {
            "step": self.step,
            "alarm": self.alarm,
            **where,
            "state": self.state,
            "since": self.since,
            "value": value,
            "threshold": self.threshold,
            "message": self.message,
            "advice": self.advice,
        }


@dataclass(slots=True)
class _Watched:
    """A condition that holds, or held until lately."""

    since: int
    lines: int
    last_step: int
    """Last logged step at which it held."""
    shown_step: int | None = None
    """Step at which its alarm was shown; None: it has not rung."""
    shown_severity: float = 0.0
    recent: list[tuple[int, float]] = field(default_factory=list)
    """Logged steps of the last `patience` ones, three at least, with their severities."""

    @classmethod
    def of(cls, *fields: Any) -> "_Watched":
        """Return what a checkpoint has; older ones have no severities."""
        recent = [(int(step), float(severity)) for step, severity in (fields[5] if len(fields) > 5 else [])]
        return cls(*fields[:5], recent=recent)

    def is_recovering(self) -> bool:
        """Return whether it is half as bad as it was lately: a router that begins to learn needs no cure."""
        return _WORSE * self.recent[-1][1] <= max(severity for _, severity in self.recent)


class Alarms:
    """All rules of a training, fed with its logged steps in order; the state is small and goes into checkpoints."""

    def __init__(self, config: AlarmsConfig, facts: TrainingFacts) -> None:
        self._config, self._facts = config, facts
        self._windows = {
            "dead": DeadExperts(config, facts),
            "growth": ImbalanceGrowth(config, facts),
            "plateau": LossPlateau(config),
        }
        self._watched: dict[AlarmKey, _Watched] = {}

    @property
    def active(self) -> list[AlarmKey]:
        """Alarms that ring now."""
        return [key for key, watched in self._watched.items() if watched.shown_step is not None]

    def look(self, observation: Observation) -> list[AlarmEvent]:
        """Apply the rules to a logged step; return what is to be shown."""
        found: dict[AlarmKey, Symptom] = {}
        for symptom in self._symptoms(observation):
            found[symptom.alarm, symptom.layer, symptom.rank] = symptom
        events = [event for key, symptom in found.items() if (event := self._hold(observation.step, key, symptom))]
        return events + list(self._release(observation.step, found))

    def _symptoms(self, observation: Observation) -> Iterator[Symptom]:
        yield from collapsed_layers(observation, self._config, self._facts)
        yield from router_symptoms(observation, self._config, self._facts)
        yield from slow_rank(observation, self._config)
        for rule in self._windows.values():
            yield from rule.find(observation)

    def _hold(self, step: int, key: AlarmKey, symptom: Symptom) -> AlarmEvent | None:
        """Note that a condition holds; return what is to be shown of its alarm."""
        since = step if symptom.since is None else symptom.since
        watched = self._watched.setdefault(key, _Watched(since=since, lines=0, last_step=step))
        watched.lines, watched.last_step = watched.lines + 1, step
        patience = self._config.patience
        lately = sum(before >= step - patience for before, _ in watched.recent)
        watched.recent = [*watched.recent[-max(lately, _FEWEST_LINES - 1) :], (step, symptom.severity)]
        is_lasting = step - watched.since >= patience and watched.lines >= _FEWEST_LINES
        if not (symptom.is_lasting or is_lasting) or watched.is_recovering():
            return None
        is_new = watched.shown_step is None
        is_worse = symptom.severity >= _WORSE * watched.shown_severity
        if not is_new and not is_worse and step - (watched.shown_step or 0) < self._config.repeat_after:
            return None
        watched.shown_step, watched.shown_severity = step, symptom.severity
        return AlarmEvent(
            step=step,
            state="rings" if is_new else "again",
            alarm=symptom.alarm,
            layer=symptom.layer,
            rank=symptom.rank,
            message=symptom.place + symptom.text,
            value=symptom.value,
            threshold=symptom.threshold,
            advice=advice(symptom, self._facts).replace("{step}", str(watched.since)),
            since=watched.since,
        )

    def _release(self, step: int, found: Mapping[AlarmKey, Symptom]) -> Iterator[AlarmEvent]:
        """Forget conditions that hold no longer; an alarm ends after as many steps without it as it took to ring."""
        for key, watched in list(self._watched.items()):
            if key in found or (watched.shown_step is not None and step - watched.last_step < self._config.patience):
                continue
            del self._watched[key]
            if watched.shown_step is not None:
                alarm, layer, rank = key
                message = f"{place_of(layer)}{alarm} has ended; it was last seen at step {watched.last_step}"
                yield AlarmEvent(
                    step=step,
                    state="ended",
                    alarm=alarm,
                    layer=layer,
                    rank=rank,
                    message=message,
                    since=watched.since,
                )

    def record(self) -> dict[str, Any]:
        """Return the state for a checkpoint, as JSON values."""
        watched = [
            [*key, w.since, w.lines, w.last_step, w.shown_step, w.shown_severity, [list(seen) for seen in w.recent]]
            for key, w in self._watched.items()
        ]
        return {"watched": watched, **{name: rule.record() for name, rule in self._windows.items()}}

    def restore(self, record: Mapping[str, Any]) -> None:
        """Restore a `record`; an empty one, of a checkpoint without alarms, begins anew."""
        self._watched = {(a, layer, rank): _Watched.of(*rest) for a, layer, rank, *rest in record.get("watched", [])}
        for name, rule in self._windows.items():
            rule.restore(record.get(name, {}))
