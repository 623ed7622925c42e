"""Schema of a sweep file: many trainings of one experiment. Imports no torch."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from trainer.config.base import Config, PathText, Problem, repeated
from trainer.config.metric_direction import direction_of
from trainer.config.numbers import Steps, Whole
from trainer.config.plugins import KindConfig

_Draws = Annotated[int, Field(gt=0, le=10_000)]
_Pair = Annotated[tuple[float, float], Field(strict=False)]
_WholePair = Annotated[tuple[int, int], Field(strict=False)]


class RangeConfig(Config):
    """Range that values are drawn from: one of these."""

    uniform: _Pair | None = None
    """Numbers between two."""
    log_uniform: _Pair | None = None
    """Positive numbers between two, whose logarithms are uniform; rounded to four digits."""
    whole: _WholePair | None = None
    """Whole numbers from the first to the second, both included."""

    def problems(self) -> Iterator[Problem]:
        """Check that there is one range, and that it is not empty."""
        given = {key: pair for key, pair in self.model_dump().items() if pair is not None}
        if len(given) != 1:
            yield Problem("", f"has {len(given)} ranges; give one of uniform, log_uniform and whole")
        for key, (low, high) in given.items():
            if low >= high:
                yield Problem(key, f"[{low}, {high}] is empty; give the smaller number first")
            elif key == "log_uniform" and low <= 0:
                yield Problem(key, f"{low} has no logarithm; use numbers above 0")


class GridConfig(KindConfig):
    """Every combination of the values of `over`, and then `points`."""

    kind: Literal["grid"] = "grid"


class ListConfig(KindConfig):
    """The `points` alone."""

    kind: Literal["list"] = "list"


class RandomConfig(KindConfig):
    """Values drawn from `over`, and then `points`."""

    kind: Literal["random"] = "random"
    draws: _Draws
    """Number of candidates to draw. More draws begin with the same ones."""
    draw_seed: Whole = 0
    """Seed of the draws."""


class HalvingConfig(KindConfig):
    """Successive halving (Jamieson and Talwalkar, arXiv 1502.07943): the best 1 / eta of the candidates go on.

    All begin with `first_steps` steps; the best 1 / eta by the metric go on, from their checkpoints, to eta times as
    many, and so on until `train.steps`. The learning rate follows the schedule of all `train.steps` from the beginning.
    """

    kind: Literal["halving"] = "halving"
    first_steps: Steps
    """Steps of the first rung."""
    eta: Annotated[int, Field(ge=2, le=100)] = 3
    """Factor between the steps of two rungs, and between their numbers of candidates."""
    draws: _Draws | None = None
    """Number of candidates to draw from `over`. Null: every combination of its values."""
    draw_seed: Whole = 0
    """Seed of the draws."""


MethodConfig = Annotated[GridConfig | ListConfig | RandomConfig | HalvingConfig, Field(discriminator="kind")]


class SweepConfig(Config):
    """A sweep: one experiment, trained at several candidates, each with several seeds and folds."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
    """Name of the sweep; its folder is RUNS_DIR/NAME, with the run folder of each trial in it."""
    config: PathText
    """Experiment file, relative to this one."""
    common: dict[str, Any] = Field(default={})
    """Keys of the experiment that all trials have, dotted as in overrides: {train.steps: 400}."""
    method: MethodConfig = GridConfig()
    """How candidates are made."""
    over: dict[str, list[Any] | RangeConfig] = Field(default={})
    """Values, or a range, of each key that is tried: {model.moe.router.top_k: [1, 2, 4]}."""
    points: list[dict[str, Any]] = Field(default=[])
    """Further candidates, each with its keys; `name` is what the candidate is called."""
    seeds: Annotated[list[Whole], Field(min_length=1)] | None = None
    """Seeds that each candidate is trained with. Null: that of the experiment."""
    folds: Annotated[int, Field(ge=2, le=1000)] | None = None
    """Parts of the documents, each held out once by every candidate (cross-validation). Null: `data.split` as it is."""
    metric: Annotated[str, Field(min_length=1, max_length=200)] = "eval/loss"
    """Key of metrics.jsonl that candidates are compared by, at the last step."""
    maximize: bool = False
    """Whether a larger metric is better."""
    slots: Annotated[int, Field(gt=0, le=1024)] = 1
    """Trials trained at the same time. Each gets an equal share of the cores, unless OMP_NUM_THREADS is set."""
    ranks: Annotated[int, Field(gt=0, le=1024)] = 1
    """Ranks of each trial."""

    def problems(self) -> Iterator[Problem]:
        """Check that the method has what it makes candidates of, and that each key is set in one place."""
        kind, draws = self.method.kind, getattr(self.method, "draws", None)
        if kind == "list" and self.over:
            yield Problem("over", "list has no combinations, only points; use method: {kind: grid}, or remove it")
        for key, values in self.over.items():
            if isinstance(values, RangeConfig) and draws is None and kind != "list":
                advice = "list its values, or use method: {kind: random, draws: N}"
                yield Problem("over", f"{key} is a range, which has no combinations; {advice}")
            elif values == []:
                yield Problem("over", f"{key} has no values; list at least one")
        if draws is not None and not self.over:
            yield Problem("over", f"there is nothing to draw {draws} candidates from; give keys and their values")
        if not self.over and not self.points:
            yield Problem("points", "there is no candidate; give keys and values in `over`, or points")
        for seed in repeated(self.seeds or []):
            yield Problem("seeds", f"{seed} is there twice; list each seed once")
        better = direction_of(self.metric)
        if better is not None and (better == "max") != self.maximize:
            right = str(better == "max").lower()
            word = "larger" if better == "max" else "smaller"
            yield Problem("maximize", f"a {word} {self.metric} is better; use maximize: {right}")
        yield from self._set_twice()

    def _set_twice(self) -> Iterator[Problem]:
        """Refuse keys that the sweep sets itself, in the places where they would be overwritten."""
        own = {"name": "each trial has its own", "runs_dir": "trials are in the sweep's folder; give it as an override"}
        own |= {} if self.seeds is None else {"seed": "`seeds` sets it"}
        own |= {} if self.folds is None else {"data.fold": "`folds` sets it"}
        for place, keys in (("common", self.common), ("over", self.over)):
            for key in sorted(own.keys() & keys):
                yield Problem(place, f"{key} cannot be set here: {own[key]}")
        for index, point in enumerate(self.points):
            for key in sorted((own.keys() - {"name"}) & point.keys()):
                yield Problem(f"points.{index}", f"{key} cannot be set here: {own[key]}")
            if not point.keys() - {"name"}:
                yield Problem(f"points.{index}", "sets no key; give it one, or remove it")
        for key in sorted(self.common.keys() & self.over.keys()):
            yield Problem("common", f"{key} is in `over` too; set it in one place")
