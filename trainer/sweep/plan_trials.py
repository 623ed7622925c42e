"""Plan the trials of a sweep: every config is loaded and checked before the first one starts. Imports no torch."""

import re
from collections.abc import Sequence
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
from trainer.sweep.dotted_keys import with_dotted_keys
from trainer.sweep.sweep_config import HalvingConfig, SweepConfig

_OF_OVERRIDE = re.compile(r"^<override (\d+)>(?=: |$)")


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
    def steps(self) -> int:
        """Steps of the whole training."""
        return self.config.train.steps

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
    named = [_Override(text, f"<override {number}>") for number, text in enumerate(overrides, 1)]
    of_sweep = [one for one in named if one.text.partition("=")[0].partition(".")[0] in SweepConfig.model_fields]
    common = [one for one in named if one not in of_sweep]
    of_sweep += [] if slots is None else [_Override(f"slots={slots}", "--slots")]
    findings: list[Finding] = []
    try:
        tree = with_dotted_keys(read_tree(path, [one.text for one in of_sweep], SweepConfig, findings))
        config = validate(tree, SweepConfig, findings)
    except ConfigError as error:
        raise ConfigError(_at_their_places(str(error), of_sweep)) from None
    plan = _Plan(path, tree, config, of_sweep, common)
    return plan.sweep()


def _at_their_places(message: str, changes: Sequence[_Override]) -> str:
    """Return a message that says of each override where it was written, not its number among `changes`."""
    places = [_OF_OVERRIDE.sub(lambda found: changes[int(found[1]) - 1].place, line) for line in message.splitlines()]
    return "\n".join(dict.fromkeys(places))


class _Plan:
    """Loads the trials of a sweep file."""

    def __init__(
        self, path: Path, tree: Node, config: SweepConfig, of_sweep: Sequence[_Override], common: Sequence[_Override]
    ) -> None:
        """Take the overrides of the sweep, which are in `tree` already, and those of the experiment."""
        self._tree, self._config, self._of_sweep = tree, config, of_sweep
        written = [self._written(("common", key), key, value) for key, value in config.common.items()]
        self._common = [*written, *common]
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
            for seed in config.seeds or [None]:
                for candidate in found:
                    try:
                        trials.append(self._trial(base, folder, candidate, seed, fold))
                    except ConfigError as error:
                        for line in str(error).splitlines():
                            problems.setdefault(line, candidate.name)
        if problems:
            raise ConfigError("\n".join(f"{line} (trial {name})" for line, name in problems.items()))
        steps = {trial.steps for trial in trials}
        if isinstance(config.method, HalvingConfig) and (len(steps) > 1 or min(steps) <= config.method.first_steps):
            given = f"{config.method.first_steps}, and trials have train.steps {', '.join(map(str, sorted(steps)))}"
            place = self._place("method", "first_steps")
            raise ConfigError(f"{place}: method.first_steps: {given}; give all the same number, above the first rung")
        for trial in trials:
            check_trained_alike(trial.folder, trial.config, advice="use another name=..., or remove the folder")
        return Sweep(config=config, candidates=found, trials=trials, folder=folder)

    def _trial(
        self, base: ExperimentConfig, folder: Path, candidate: Candidate, seed: int | None, fold: int | None
    ) -> Trial:
        """Load the config of a trial; a seed of None is the experiment's, or the candidate's.

        Raises:
            ConfigError: if it is not sound, or would not train to its last step.
        """
        changes = [self._written(where, key, candidate.changes[key]) for key, where in candidate.places.items()]
        shown = candidate.changes.get("seed", base.seed) if seed is None else seed
        own = self._own(base, folder, f"{candidate.name}{'' if fold is None else f'-fold{fold}'}-seed{shown}")
        if seed is not None:
            own.append(_Override(f"seed={seed}", "seeds"))
        if fold is not None:
            own.append(_Override(f"data.fold={{index: {fold}, of: {self._config.folds}}}", self._place("folds")))
        trial = self._load([*self._common, *changes, *own])
        check_packages(trial)
        ends_early = {"early_stopping": trial.train.early_stopping, "stop_after": trial.train.stop_after}
        for key, value in ends_early.items():
            if value is not None:
                why = "trials would end at different steps, which cannot be compared; use null"
                raise ConfigError(f"train.{key}: {why}")
        parallel = trial.parallel
        check_layout(parallel.degrees, world_size=self._config.ranks)
        return Trial(candidate=candidate, seed=trial.seed, fold=fold, config=trial)

    def _own(self, base: ExperimentConfig, folder: Path, name: str) -> list[_Override]:
        """Return what distinguishes a trial from others, and puts it into the sweep's folder."""
        own = [_Override(f"name={inline(name)}", "name"), _Override(f"runs_dir={inline(str(folder))}", "runs_dir")]
        if base.metrics.wandb.group is None:
            own.append(_Override(f"metrics.wandb.group={self._config.name}", "name"))
        return own

    def _load(self, changes: Sequence[_Override]) -> ExperimentConfig:
        """Load the experiment; problems of an override are reported where it was written."""
        try:
            return load(self._experiment, [change.text for change in changes], ExperimentConfig)
        except ConfigError as error:
            text = _at_their_places(str(error), changes)
        if not self._experiment.is_file():
            text = "\n".join(f"{self._place('config')}: config: {line}" for line in text.splitlines())
        raise ConfigError(text)

    def _place(self, *key: str | int) -> str:
        return _at_their_places(str(_node_at(self._tree, key).place), self._of_sweep)

    def _written(self, where: tuple[str | int, ...], key: str, value: Any) -> _Override:
        return _Override(f"{key}={inline(value)}", self._place(*where))


def _node_at(tree: Node, key: tuple[str | int, ...]) -> Node:
    for part in key:
        tree = tree.below(part) or tree
    return tree


def write_config(trial: Trial) -> Path:
    """Write the config of a trial beside its run folder; return the file."""
    path = trial.folder.path.with_name(f"{trial.name}.yaml")
    path.write_text(dump(trial.config))
    return path
