"""Plan the trials of a sweep: every config is loaded and checked before the first one starts. Imports no torch."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.checkpoint.run_folder import RunFolder
from trainer.config.check_packages import check_packages
from trainer.config.dump import dump, inline
from trainer.config.loader import load, read_tree, validate
from trainer.config.nodes import Finding, Node
from trainer.distributed.rank_layout import check_layout
from trainer.errors import ConfigError
from trainer.experiment import ExperimentConfig
from trainer.lab.router_trainings import check_trained_alike
from trainer.sweep.candidates import Candidate, candidates
from trainer.sweep.sweep_config import HalvingConfig, SweepConfig

_OF_OVERRIDE = re.compile(r"<override (\d+)>(?=: )")


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One training: a candidate with a seed and a fold."""

    candidate: Candidate
    seed: int
    fold: int | None
    config: ExperimentConfig

    @property
    def name(self) -> str:
        """Name of its run."""
        return self.config.name

    @property
    def folder(self) -> RunFolder:
        """Its run folder."""
        return RunFolder(Path(self.config.runs_dir) / self.config.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """A sweep with its trials in their order: every candidate with one seed and fold, then with the next."""

    config: SweepConfig
    candidates: Sequence[Candidate]
    trials: Sequence[Trial]
    folder: Path

    def trials_of(self, candidate: Candidate) -> list[Trial]:
        """Return the trials of a candidate."""
        return [trial for trial in self.trials if trial.candidate.name == candidate.name]


@dataclass(frozen=True, slots=True)
class _Override:
    """An override of the experiment, and where it was written."""

    text: str
    place: str


def plan_sweep(path: Path, overrides: Sequence[str], *, slots: int | None = None) -> Sweep:
    """Load a sweep file and the config of every trial.

    Overrides whose first word is a key of the sweep change the sweep, others the experiment.

    Raises:
        ConfigError: with every problem at its place; of a trial, with its name. Also if a folder was trained with
            another config.
    """
    of_sweep = [text for text in overrides if text.partition("=")[0].partition(".")[0] in SweepConfig.model_fields]
    of_sweep += [] if slots is None else [f"slots={slots}"]
    findings: list[Finding] = []
    tree = read_tree(path, of_sweep, SweepConfig, findings)
    config = validate(tree, SweepConfig, findings)
    common = [_Override(text, f"<override {number}>") for number, text in enumerate(overrides, 1)]
    common = [one for one in common if one.text not in of_sweep]
    written = [_written(tree, ("common", key), key, value) for key, value in config.common.items()]
    return _Plan(path, tree, config, [*written, *common]).sweep()


class _Plan:
    """Loads the trials of a sweep file."""

    def __init__(self, path: Path, tree: Node, config: SweepConfig, common: Sequence[_Override]) -> None:
        self._tree, self._config, self._common = tree, config, common
        self._experiment = path.parent / config.config

    def sweep(self) -> Sweep:
        config, common = self._config, self._common
        base = self._load([*common, _Override(f"name={config.name}", "name")])
        trials: list[Trial] = []
        problems: dict[str, str] = {}
        try:
            found = candidates(config)
        except ConfigError as error:
            raise ConfigError(f"{self._tree.place.source}: {error}") from None
        folder = Path(base.runs_dir) / config.name
        for fold in [None] if config.folds is None else range(config.folds):
            for seed in config.seeds or [base.seed]:
                for candidate in found:
                    own = self._own(base, folder, candidate, seed, fold)
                    changes = [
                        _written(self._tree, where, key, candidate.changes[key])
                        for key, where in candidate.places.items()
                    ]
                    try:
                        trial = self._load([*common, *changes, *own])
                        check_packages(trial)
                        if trial.train.early_stopping is not None:
                            why = "trials would end at different steps, which cannot be compared; use null"
                            raise ConfigError(f"train.early_stopping: {why}")
                        parallel = trial.parallel
                        check_layout(world_size=config.ranks, ep_size=parallel.ep_size, shard_size=parallel.shard_size)
                    except ConfigError as error:
                        for line in str(error).splitlines():
                            problems.setdefault(line, candidate.name)
                        continue
                    trials.append(Trial(candidate=candidate, seed=seed, fold=fold, config=trial))
        if problems:
            raise ConfigError("\n".join(f"{line} (trial {name})" for line, name in problems.items()))
        steps = {trial.config.train.steps for trial in trials}
        if isinstance(config.method, HalvingConfig) and (len(steps) > 1 or min(steps) <= config.method.first_steps):
            given = f"{config.method.first_steps}, and trials have train.steps {', '.join(map(str, sorted(steps)))}"
            place = self._place(("method", "first_steps"))
            raise ConfigError(f"{place}: method.first_steps: {given}; give all the same number, above the first rung")
        for trial in trials:
            check_trained_alike(trial.folder, trial.config, advice="use another name=..., or remove the folder")
        return Sweep(config=config, candidates=found, trials=trials, folder=folder)

    def _own(
        self, base: ExperimentConfig, folder: Path, candidate: Candidate, seed: int, fold: int | None
    ) -> Iterator[_Override]:
        """Yield what distinguishes a trial from other trials of its candidate, and puts it into the sweep's folder."""
        config = self._config
        name = "-".join([candidate.name, *([] if fold is None else [f"fold{fold}"]), f"seed{seed}"])
        yield _Override(f"name={inline(name)}", "name")
        yield _Override(f"runs_dir={inline(str(folder))}", "runs_dir")
        yield _Override(f"seed={seed}", "seeds")
        if fold is not None:
            yield _Override(f"data.fold={{index: {fold}, of: {config.folds}}}", str(self._place(("folds",))))
        if base.metrics.wandb.group is None:
            yield _Override(f"metrics.wandb.group={config.name}", "name")

    def _load(self, changes: Sequence[_Override]) -> ExperimentConfig:
        """Load the experiment; problems of an override are reported where it was written."""
        try:
            return load(self._experiment, [change.text for change in changes], ExperimentConfig)
        except ConfigError as error:
            text = str(error)
        lines = [_OF_OVERRIDE.sub(lambda found: changes[int(found[1]) - 1].place, line) for line in text.splitlines()]
        if not self._experiment.is_file():
            lines = [f"{self._place(('config',))}: config: {line}" for line in lines]
        raise ConfigError("\n".join(dict.fromkeys(lines)))

    def _place(self, key: tuple[str | int, ...]) -> Any:
        return _node_at(self._tree, key).place


def _written(tree: Node, where: tuple[str | int, ...], key: str, value: Any) -> _Override:
    return _Override(f"{key}={inline(value)}", str(_node_at(tree, where).place))


def _node_at(tree: Node, key: tuple[str | int, ...]) -> Node:
    for part in key:
        tree = tree.below(part) or tree
    return tree


def write_config(trial: Trial) -> Path:
    """Write the config of a trial beside its run folder; return the file."""
    path = trial.folder.path.with_name(f"{trial.name}.yaml")
    path.write_text(dump(trial.config))
    return path
