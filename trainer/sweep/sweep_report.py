"""Show the outcome of a sweep: a table, sweep.json and a picture. Imports no torch."""

from collections.abc import Sequence
from typing import Any

from trainer.config.dump import short
from trainer.console import formatting
from trainer.console.result_tables import result_screen, result_table, write_result
from trainer.console.scatter import Point, Scatter
from trainer.console.style import QUIET
from trainer.console.svg import MARGIN, document, text
from trainer.sweep.grid_ends import end_warnings
from trainer.sweep.outcome import CandidateOutcome, behind, best_of, recommend
from trainer.sweep.plan_trials import Sweep
from trainer.sweep.sweep_config import SweepConfig

_COLUMNS = ("mean", "+-", "behind best", "+-", "trials", "steps", "FLOPs", "train s")
_LEGEND = """\
+-       standard error over seeds and folds, of the mean and of the difference from the best, trial by trial
FLOPs    of a whole training, forward and backward, of the weights that a token uses
train s  seconds in training steps, while the other slots train too
*        recommended"""


def sweep_record(sweep: Sweep, outcomes: Sequence[CandidateOutcome]) -> dict[str, Any]:
    """Return the outcome as JSON values; all but `train_s` are the same however often the sweep was stopped."""
    config = sweep.config
    chosen, best = recommend(outcomes, maximize=config.maximize), best_of(outcomes, maximize=config.maximize)
    return {
        "name": config.name,
        "metric": config.metric,
        "maximize": config.maximize,
        "seeds": config.seeds,
        "folds": config.folds,
        "candidates": [_candidate_record(one, best) for one in outcomes],
        "recommended": None if chosen is None else {"name": chosen.name, "reason": chosen.reason},
        "warnings": end_warnings(sweep, outcomes),
    }


def _candidate_record(one: CandidateOutcome, best: CandidateOutcome | None) -> dict[str, Any]:
    difference = None if best is None or not one.is_comparable else behind(one, best)
    return {
        "name": one.name,
        "changes": dict(one.candidate.changes),
        "steps": one.steps,
        "is_final": one.is_final,
        "mean": one.mean,
        "standard_error": one.error,
        "behind_best": None if difference is None else difference[0],
        "behind_best_standard_error": None if difference is None else difference[1],
        "training_flops": one.training_flops,
        "train_s": one.train_s,
        "trials": [
            {"fold": fold, "seed": seed, "value": result.value, "train_s": result.train_s}
            for (fold, seed), result in one.results.items()
        ],
        "forward_flops_per_token": _first(one, "forward_flops_per_token"),
        "active_parameters": _first(one, "active_parameters"),
        "failures": dict(one.failures),
    }


def _first(one: CandidateOutcome, key: str) -> Any:
    return next((getattr(result, key) for result in one.results.values()), None)


def show_sweep(sweep: Sweep, outcomes: Sequence[CandidateOutcome]) -> None:
    """Print the table, the failures and the recommendation with its warnings."""
    config = sweep.config
    screen, table = result_screen(), result_table(f"{config.name}: {config.metric}", "candidate", *_COLUMNS)
    chosen, best = recommend(outcomes, maximize=config.maximize), best_of(outcomes, maximize=config.maximize)
    for one in outcomes:
        difference = None if best is None or not one.is_comparable else behind(one, best)
        table.add_row(
            f"{one.name} *" if chosen is not None and one.name == chosen.name else one.name,
            formatting.number(one.mean, digits=4),
            formatting.number(one.error, digits=4),
            *(formatting.number(number, digits=4) for number in difference or (None, None)),
            f"{len(one.results)}/{one.num_trials}",
            str(one.steps),
            formatting.rate(one.training_flops),
            formatting.number(one.train_s, digits=1),
        )
    screen.print(table)
    screen.print(_LEGEND, style=QUIET, soft_wrap=True)
    for one in outcomes:
        for name, reason in one.failures.items():
            screen.print(f"failed: {name}: {reason}", soft_wrap=True)
    if chosen is not None:
        screen.print(f"recommended: {chosen.name}: {chosen.reason}", soft_wrap=True)
    for warning in end_warnings(sweep, outcomes):
        screen.print(f"warning: {warning}", soft_wrap=True)


def write_sweep(sweep: Sweep, outcomes: Sequence[CandidateOutcome]) -> None:
    """Write sweep.json, and sweep.svg once there is a point to draw.

    Raises:
        ResourceError: if the disk refuses.
    """
    advice = "make room, or set runs_dir to another place, and repeat the command"
    write_result(sweep.folder / "sweep.json", sweep_record(sweep, outcomes), advice=advice)
    if any(one.mean is not None and one.training_flops for one in outcomes):
        write_result(sweep.folder / "sweep.svg", sweep_svg(sweep.config, outcomes), advice=advice)


def sweep_svg(config: SweepConfig, outcomes: Sequence[CandidateOutcome]) -> str:
    """Return an SVG of the metric over the FLOPs of a training and over its seconds, with standard errors.

    Candidates that did not train to the end are rings.
    """
    found = recommend(outcomes, maximize=config.maximize)
    chosen = None if found is None else found.name
    flops = [_point(one, one.training_flops or 0, chosen) for one in outcomes if one.results]
    times = [_point(one, one.train_s or 0, chosen) for one in outcomes if one.results]
    by_flops = Scatter(
        points=flops, left=MARGIN + 50, top=72, width=400, x_title="FLOPs of a training, of the weights a token uses"
    )
    by_time = Scatter(points=times, left=by_flops.right + 90, top=72, width=400, x_title="seconds of training steps")
    better = "higher" if config.maximize else "lower"
    note = f"{config.metric}: {better} is better; bars are one standard error; * is recommended"
    body = [
        text(MARGIN, 48, note, "quiet"),
        *by_flops.draw(formatting.rate, lambda value: f"{value:.3f}"),
        *by_time.draw(lambda seconds: f"{seconds:.3g}", lambda value: f"{value:.3f}"),
    ]
    return document(body, title=f"Sweep {config.name}", width=by_time.right + MARGIN, height=by_time.bottom + 60)


def _point(one: CandidateOutcome, x: float, chosen: str | None) -> Point:
    assert one.mean is not None, "it has results"
    values = ", ".join(f"{key} {short(value)}" for key, value in one.candidate.changes.items())
    return Point(
        x=x,
        y=one.mean,
        name=f"{one.name} *" if one.name == chosen else one.name,
        style="no" if one.is_comparable else "ahead",
        tooltip=f"{values}: {one.mean:.4f}",
        error=one.error or 0.0,
    )
