"""The card of a run: what was trained and how far, from its folder alone. Imports no torch."""

from trainer.experiment import ExperimentConfig
from trainer.report.report_data import Matrix, RunCard
from trainer.runs.recorded_log import finite, read_log
from trainer.runs.recorded_run import RecordedRun


def card_of_run(run: RecordedRun, config: ExperimentConfig) -> RunCard:
    """Return the card of a run without what only its checkpoint tells: step, parameters, domains."""
    moe, last = config.model.moe, _last_values(run)
    tokens = last.get("tokens")
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
        training_load=_last_load(run),
        config=config.model_dump(mode="json"),
        step=None,
        parameters=None,
        active_parameters=None,
        domains=(),
    )


def _last_values(run: RecordedRun) -> dict[str, float]:
    """Return the last finite value of every key of metrics.jsonl."""
    last: dict[str, float] = {}
    for record in read_log(run.folder.metrics).records:
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
