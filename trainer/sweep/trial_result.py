"""Result of a trial, read from its run folder. Imports no torch."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.checkpoint.checkpoint_folder import CheckpointFolder
from trainer.errors import DataError
from trainer.sweep.plan_trials import Trial
from trainer.trackers.jsonl import read_jsonl


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialResult:
    """A trial that has trained to a step."""

    value: float
    """The metric at that step."""
    train_s: float
    """Seconds in training steps, without evaluation, saving and start-up."""
    training_flops: float | None
    """Of all its tokens, forward and backward; of active weights only. None: the run does not say."""
    forward_flops_per_token: int | None
    active_parameters: int | None


def has_trained(trial: Trial, step: int) -> bool:
    """Return whether a trial has a checkpoint of a step, or of a later one."""
    return CheckpointFolder(trial.folder.checkpoints).steps()[-1:] >= [step]


def read_result(trial: Trial, metric: str, step: int) -> TrialResult:
    """Read the result of a trial that has trained to a step.

    Raises:
        DataError: if its metrics.jsonl is damaged, or does not have the metric at that step.
    """
    path = trial.folder.metrics
    records = [record for record in read_jsonl(path) if record["step"] <= step] if path.is_file() else []
    last = [record for record in records if record["step"] == step]
    values = [record[metric] for record in last if isinstance(record.get(metric), int | float)]
    if not values:
        names = sorted({key for record in last for key in record if key.startswith("eval/")})
        known = f"it has {', '.join(names)}" if names else "there was no evaluation"
        raise DataError(f"{path}: no {metric} at step {step}; {known}")
    size = _model_size(trial)
    tokens = next((record["tokens"] for record in reversed(records) if "tokens" in record), None)
    forward, backward = size.get("forward_flops_per_token"), size.get("backward_flops_per_token")
    is_known = tokens is not None and forward is not None and backward is not None
    return TrialResult(
        value=float(values[-1]),
        train_s=_train_s(records),
        training_flops=float(tokens * (forward + backward)) if is_known else None,
        forward_flops_per_token=forward,
        active_parameters=size.get("active_parameters"),
    )


def _train_s(records: Sequence[Mapping[str, Any]]) -> float:
    """Return the seconds of all steps: each record has the mean since the one before it."""
    seconds, before = 0.0, 0
    for record in records:
        if record.get("step_s") is not None:
            seconds += record["step_s"] * (record["step"] - before)
            before = record["step"]
    return seconds


def _model_size(trial: Trial) -> Mapping[str, Any]:
    try:
        found = json.loads(trial.folder.environment.read_text()).get("model_size")
    except (OSError, ValueError, AttributeError):
        return {}
    return found if isinstance(found, dict) else {}
