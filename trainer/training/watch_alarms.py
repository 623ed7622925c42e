"""Alarms of a run: what rules need to know of its config, and where alarms are shown."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from trainer.experiment import ExperimentConfig
from trainer.metrics.alarms.alarms import AlarmEvent, Alarms
from trainer.metrics.alarms.observation import Observation
from trainer.metrics.alarms.symptom import TrainingFacts
from trainer.models.freeze import is_frozen
from trainer.models.gpt import GPT
from trainer.trackers.base import JsonlTracker


@dataclass(slots=True)
class AlarmWatch:
    """Alarms of a run on the rank that writes its logs."""

    alarms: Alarms
    logs: JsonlTracker

    @classmethod
    def of(cls, config: ExperimentConfig, model: GPT, logs: JsonlTracker | None) -> "AlarmWatch | None":
        """Create the alarms of a run; None where they are switched off, or this rank writes no logs."""
        section = config.metrics.alarms
        return None if section is None or logs is None else cls(Alarms(section, training_facts(config, model)), logs)

    def look(self, record: Mapping[str, Any], experts: Mapping[str, Any] | None) -> list[str]:
        """Write the alarms of a logged step to alarms.jsonl; return lines for the console, one for each alarm."""
        observation = Observation.of(record, experts)
        events = [] if observation is None else self.alarms.look(observation)
        for event in events:
            self.logs.log_alarm(event.record())
        events.sort(key=lambda event: (event.state, event.alarm))
        return [_line(list(same)) for _, same in groupby(events, key=lambda event: (event.state, event.alarm))]


def training_facts(config: ExperimentConfig, model: GPT) -> TrainingFacts:
    """Return the settings that rules and their advice need."""
    moe, peak_lr = config.model.moe, getattr(config.schedule, "peak_lr", None)
    layers = model.moe_layers()
    if moe is None or not layers:
        return TrainingFacts(peak_lr=peak_lr)
    rate = getattr(moe.router, "bias_update_rate", None)
    return TrainingFacts(
        num_experts=moe.num_experts + moe.router.num_null_experts,
        router=moe.router.kind,
        learns_routing=moe.router.has_probs,
        is_router_frozen=all(is_frozen(layer.router) for layer in layers),
        score=getattr(moe.router, "score", "softmax"),
        balance_coef=moe.balance.coef,
        z_loss_coef=moe.z_loss_coef,
        # A rate of 0 is how group_limited says that it has no bias.
        bias_update_rate=rate if rate or moe.router.kind == "bias_balanced" else None,
        peak_lr=peak_lr,
        layers=tuple(config.model.moe_layers),
    )


def _line(events: list[AlarmEvent]) -> str:
    """Return the line of an alarm that one or more layers ring at the same step."""
    first = events[0]
    others = [str(event.layer if event.rank is None else event.rank) for event in events[1:]]
    more = f" (and {'layers' if first.rank is None else 'ranks'} {', '.join(others)})" if others else ""
    if first.state == "ended":
        return f"alarm ended: {first.message}{more}"
    again = ", still" if first.state == "again" else ""
    return f"alarm {first.alarm}{again}: {first.message}{more}; {first.advice}"
