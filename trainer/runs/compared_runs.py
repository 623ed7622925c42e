"""Compare runs: those that differ only by their seed are one group, whose means are compared. Imports no torch."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from trainer.config.dump import ABSENT, changed_values, inline
from trainer.errors import ConfigError
from trainer.runs.recorded_config import plain_config, recorded_config
from trainer.runs.recorded_run import RecordedRun
from trainer.runs.run_figures import ListedRun
from trainer.runs.significance import Difference, error_of_mean, welch

COMPARED: Final = ("eval_loss", "bits_per_byte", "loss", "drop_rate", "load_imbalance", "tokens_per_s", "train_s")
"""Figures that are compared."""
_OF_NO_GROUP: Final = ("name", "runs_dir", "seed")
"""Keys that runs of one group may differ in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedGroup:
    """Runs whose configs differ by nothing but their seed and name."""

    runs: Sequence[ListedRun]
    config: Mapping[str, Any]
    seeds: Sequence[object]
    """Seed of each run."""

    @property
    def name(self) -> str:
        """Path of its first run, and the number of the others."""
        first = str(self.runs[0].path)
        return first if len(self.runs) == 1 else f"{first} and {len(self.runs) - 1} more"

    def values(self, key: str) -> list[float]:
        """Return a figure of each seed; runs of the same seed are one sample, their mean."""
        by_seed = dict[str, list[float]]()
        for run, seed in zip(self.runs, self.seeds, strict=True):
            if (value := getattr(run.figures, key)) is not None:
                by_seed.setdefault(str(seed), []).append(value)
        return [statistics.fmean(values) for values in by_seed.values()]


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedFigure:
    """One figure of every group, and the difference of each group to the first."""

    key: str
    means: Sequence[float | None]
    standard_errors: Sequence[float | None]
    num_seeds: Sequence[int]
    differences: Sequence[Difference | None]
    """One for each group but the first."""

    def record(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)


def seed_groups(runs: Sequence[ListedRun]) -> list[SeedGroup]:
    """Group runs that differ only by seed, in the order of their first runs.

    Raises:
        ConfigError: if a config cannot be read.
    """
    found: list[tuple[dict[str, Any], list[ListedRun], list[object]]] = []
    for run in runs:
        config = _values(run)
        seed = config.get("seed")
        shared = {key: value for key, value in config.items() if key not in _OF_NO_GROUP}
        group = next((group for group in found if group[0] == shared), None)
        if group is None:
            group = (shared, [], [])
            found.append(group)
        group[1].append(run)
        group[2].append(seed)
    return [SeedGroup(config=config, runs=runs, seeds=seeds) for config, runs, seeds in found]


def config_differences(groups: Sequence[SeedGroup]) -> dict[str, list[str]]:
    """Return the value of every group for each key in which any of them differs from the first."""
    keys = dict[str, None]()
    values = list[dict[str, Any]]()
    for group in groups:
        changes = changed_values(groups[0].config, group.config)
        keys |= {change.key: None for change in changes}
        values.append({change.key: change.new for change in changes})
    first = {change.key: change.old for group in groups for change in changed_values(groups[0].config, group.config)}
    return {key: [_written(group.get(key, first[key])) for group in values] for key in keys}


def compare_figures(groups: Sequence[SeedGroup]) -> list[ComparedFigure]:
    """Compare the figures that at least one group has."""
    compared = []
    for key in COMPARED:
        values = [group.values(key) for group in groups]
        if any(values):
            compared.append(
                ComparedFigure(
                    key=key,
                    means=[statistics.fmean(one) if one else None for one in values],
                    standard_errors=[error_of_mean(one) for one in values],
                    num_seeds=[len(one) for one in values],
                    differences=[welch(values[0], one) if values[0] and one else None for one in values[1:]],
                )
            )
    return compared


def cautions(groups: Sequence[SeedGroup]) -> list[str]:
    """Say what makes a comparison unfair or its significance untellable."""
    said = []
    runs = [run for group in groups for run in group.runs]
    tokens = {run.figures.tokens for run in runs}
    if len(tokens) > 1:
        said.append("the runs have read different numbers of tokens, so their losses are not of one budget")
    said += other_text([RecordedRun(run.path) for run in runs])
    if unfinished := [str(run.path) for run in runs if run.state.state != "finished"]:
        said.append(f"not finished: {', '.join(unfinished)}")
    if len(groups) > 1 and (single := [group.name for group in groups if len(set(map(str, group.seeds))) < 2]):
        said.append(f"one seed: {', '.join(single)}; no significance can be told, train further seeds")
    if len(groups) > 2:
        said.append(f"{len(groups) - 1} groups are compared with the first, and p is not corrected for that")
    return said


def _values(run: ListedRun) -> dict[str, Any]:
    """Return the config of a run with today's defaults; as it stands if it is not of this version."""
    recorded = RecordedRun(run.path)
    try:
        return recorded_config(recorded.folder).model_dump(mode="json")
    except ConfigError:
        return plain_config(recorded.folder)


def _written(value: object) -> str:
    return repr(value) if value is ABSENT else inline(value)


def other_text(runs: Sequence[RecordedRun]) -> list[str]:
    """Say why losses of runs are of different things: other tokens, or other text."""
    environments = [run.environment() for run in runs]

    def differs(key: str) -> bool:
        return len({str(one[key]) for one in environments if key in one}) > 1

    if differs("tokenizer_fingerprint"):
        return ["their tokenizers differ, so losses per token cannot be compared; bits per byte can, on the same text"]
    return ["their text differs, held-out text too"] if differs("data_fingerprint") else []
