"""Result of a trial, read from its run folder. Imports no torch."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainer.checkpoint.checkpoint_folder import CheckpointFolder
from trainer.errors import DataError
from trainer.runs.recorded_log import finite
from trainer.runs.run_figures import train_seconds
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
    """Return whether a trial has a checkpoint of a step, or of its last one if that is earlier, or of a later one."""
    return CheckpointFolder(trial.folder.checkpoints).steps()[-1:] >= [min(step, trial.steps)]


def read_result(trial: Trial, metric: str, step: int) -> TrialResult:
    """Read the result of a trial that has trained to a step, or to its last one if that is earlier.

    Raises:
        DataError: if its metrics.jsonl is damaged, or does not have the metric at that step.
    """
    path, step = trial.folder.metrics, min(step, trial.steps)
    records = [record for record in read_jsonl(path) if record["step"] <= step] if path.is_file() else []
    last = [record for record in records if record["step"] == step]
    values = [value for record in last if (value := finite(record, metric)) is not None]
    if not values and any(metric in record for record in last):
        raise DataError(f"{path}: {metric} at step {step} is not a finite number; lower schedule.peak_lr")
    if not values:
        names = sorted({key for record in last for key in record if key.startswith("eval/")})
        known = f"it has {', '.join(names)}" if names else "there was no evaluation"
        raise DataError(f"{path}: no {metric} at step {step}; {known}")
    size = _model_size(trial)
    tokens = next((record["tokens"] for record in reversed(records) if "tokens" in record), None)
    forward, backward = size.get("forward_flops_per_token"), size.get("backward_flops_per_token")
    is_known = tokens is not None and forward is not None and backward is not None
    return TrialResult(
        value=values[-1],
        train_s=train_seconds(records),
        training_flops=float(tokens * (forward + backward)) if is_known else None,
        forward_flops_per_token=forward,
        active_parameters=size.get("active_parameters"),
    )


def _model_size(trial: Trial) -> Mapping[str, Any]:
    try:
        found = json.loads(trial.folder.environment.read_text()).get("model_size")
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
