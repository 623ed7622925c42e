"""The card of a run: what was trained and how far, from its folder alone. Imports no torch."""

from collections.abc import Mapping
from typing import Any

from trainer.experiment import ExperimentConfig
from trainer.report.report_data import Matrix, RunCard
from trainer.runs.recorded_log import RecordedLog, finite, read_log
from trainer.runs.recorded_run import RecordedRun
from trainer.runs.run_figures import figures_of


def card_of_run(run: RecordedRun, config: ExperimentConfig) -> RunCard:
    """Return the card of a run without what only its checkpoint tells: step and domains."""
    moe, log = config.model.moe, read_log(run.folder.metrics)
    last = _last_values(log)
    tokens, environment = last.get("tokens"), run.environment()
    return RunCard(
        name=config.name,
        folder=str(run.path),
        planned_steps=config.train.steps,
        trained_tokens=None if tokens is None else int(tokens),
        moe_layers=tuple(config.model.moe_layers),
        num_experts=None if moe is None else moe.num_experts,
        top_k=None if moe is None else moe.router.recorded_k,
        router=None if moe is None else moe.router.kind,
        capacity_factor=None if moe is None else moe.capacity.factor,
        last=last,
        training_s=figures_of(log).train_s,
        trained_on=_device(environment),
        training_load=_last_load(run),
        config=config.model_dump(mode="json"),
        step=None,
        parameters=_parameters(environment, "total_parameters"),
        active_parameters=_parameters(environment, "active_parameters"),
        domains=(),
    )


def _parameters(environment: Mapping[str, Any], key: str) -> int | None:
    """Return a number of parameters; None if the run has no record of it."""
    size = environment.get("model_size")
    found = size.get(key) if isinstance(size, dict) else None
    return found if type(found) is int else None


def _device(environment: Mapping[str, Any]) -> str | None:
    """Return the device and the number of ranks; None if the run has no record of them."""
    device, ranks = environment.get("device"), environment.get("world_size")
    name = environment.get("gpu") if str(device).startswith("cuda") else device
    if not isinstance(name, str) or type(ranks) is not int:
        return None
    return f"{name}, {ranks} rank{'s' if ranks != 1 else ''}"


def _last_values(log: RecordedLog) -> dict[str, float]:
    """Return the last finite value of every key of metrics.jsonl."""
    last: dict[str, float] = {}
    for record in log.records:
        last |= {key: value for key in record if (value := finite(record, key)) is not None}
    return last


def _last_load(run: RecordedRun) -> Matrix:
    """Return (L, E) the share of each expert in the last record of routing.jsonl; empty without one."""
    for record in reversed(read_log(run.folder.routing).records):
        counts = record.get("counts")
        if isinstance(counts, list) and counts and all(_is_counts(layer) for layer in counts):
            return tuple(tuple(count / max(1, sum(layer)) for count in layer) for layer in counts)
    return ()


def _is_counts(layer: object) -> bool:
    return isinstance(layer, list) and all(type(count) is int and count >= 0 for count in layer)
