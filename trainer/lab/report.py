"""The benches of routers on the screen and on the disk."""

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from trainer.atomic_io import replace_file
from trainer.console import formatting
from trainer.console.style import QUIET
from trainer.errors import ResourceError
from trainer.lab.logits import LogitsKind
from trainer.lab.router_choices import FACTORS, Choice
from trainer.lab.training_outcomes import TrainingOutcome

_WIDTH = 200
"""Width of a table that no terminal reads: nothing is cut there."""
_REFERENCE = "top_k"
_CHOICES_LEGEND = """\
k        experts of a token in the programme that choices are measured on
asked    how many experts a token asked for, mean
kept     sum of the softmax scores of what was chosen, over the largest sum that there is with k experts for
         a token and room at an expert for its fair share of a sequence (or 1.25 of that, with which the
         largest sum is larger); a choice is first cut down to what this allows: a token's best k, then an
         expert's first tokens
gap      what is missing of the largest sum, with room for a fair share
busiest  load of the busiest expert over the mean, before drops, of the worst layer
drop     share of the wanted k experts of each token that it did not get: no room, or not asked for
x top_k  time of a call over that of top_k: medians of interleaved rounds, on the CPU, without gradients"""
_OUTCOMES_LEGEND = """\
held out nats per token at the end, mean over seeds, routed as the router's config says for evaluation
+-       standard deviation over seeds
busiest  load of the busiest expert over the mean, of the worst layer; here and for the next three the mean
         over the last tenth of the steps counts
drop     share of the assignments that were over capacity
asked    how many experts a token asked for
width    hidden units computed for a token: asked times the width of an expert
x top_k  median time of a step over that of top_k; trainings run one after the other, so leave the machine alone
ahead    a token's experts depend on later tokens: no, in training, or always (its held-out loss is flattered)"""


def show_choices(choices: Sequence[Choice], titles: Mapping[LogitsKind, str], *, notes: Sequence[str]) -> None:
    """Print a table for each kind of logits.

    Args:
        choices: of all kinds.
        titles: of each kind's table.
        notes: lines below all.
    """
    screen = _screen()
    for kind, title in titles.items():
        mine = [choice for choice in choices if choice.logits == kind]
        table = _table(
            title, "k", "asked", "kept 1.0", "kept 1.25", "gap", "busiest", "drop 1.0", "drop 1.25", "ms", "x top_k"
        )
        for choice in mine:
            fair, more = (choice.at[factor] for factor in FACTORS)
            table.add_row(
                choice.router,
                str(choice.top_k),
                formatting.number(choice.experts_per_token, digits=2),
                *(formatting.number(1 - measured.gap, digits=4) for measured in (fair, more)),
                formatting.percent(max(0.0, fair.gap)),  # of the optimum a rounding error may be below 0
                formatting.number(choice.load_imbalance, digits=2),
                *(formatting.percent(measured.drop_rate) for measured in (fair, more)),
                formatting.number(choice.call_s * 1e3, digits=2),
                formatting.ratio(_times_reference(choice.call_s, {one.router: one.call_s for one in mine})),
            )
        screen.print(table)
    _foot(screen, _CHOICES_LEGEND, notes)


def show_outcomes(outcomes: Sequence[TrainingOutcome], title: str, *, notes: Sequence[str]) -> None:
    """Print a table of what was learned, a line for each router."""
    screen = _screen()
    table = _table(title, "held out", "+-", "busiest", "drop", "asked", "width", "step ms", "x top_k", "ahead")
    step_s = {one.router: one.step_s for one in outcomes}
    for one in outcomes:
        spread = statistics.stdev(one.held_out_losses) if len(one.held_out_losses) > 1 else None
        table.add_row(
            one.router,
            formatting.number(one.held_out_loss, digits=4),
            formatting.number(spread, digits=4),
            formatting.number(one.load_imbalance, digits=2),
            formatting.percent(one.drop_rate),
            formatting.number(one.experts_per_token, digits=2),
            formatting.number(one.width_per_token, digits=0),
            formatting.number(one.step_s * 1e3, digits=1),
            formatting.ratio(_times_reference(one.step_s, step_s)),
            one.looks_ahead,
        )
    screen.print(table)
    _foot(screen, _OUTCOMES_LEGEND, notes)


def choices_record(choices: Sequence[Choice]) -> list[dict[str, Any]]:
    """Return everything the tables say, in JSON values."""
    return [
        {
            "router": choice.router,
            "logits": choice.logits,
            "top_k": choice.top_k,
            "experts_per_token": choice.experts_per_token,
            "load_imbalance": choice.load_imbalance,
            "call_s": choice.call_s,
            "at": {
                str(factor): {
                    "score_kept": 1 - measured.gap,
                    "gap": measured.gap,
                    "drop_rate": measured.drop_rate,
                    "optimum_drop_rate": measured.optimum_drop_rate,
                }
                for factor, measured in choice.at.items()
            },
        }
        for choice in choices
    ]


def outcomes_record(outcomes: Sequence[TrainingOutcome]) -> list[dict[str, Any]]:
    """Return everything the table says, in JSON values."""
    return [
        {
            "router": one.router,
            "held_out_loss": one.held_out_loss,
            "held_out_losses": list(one.held_out_losses),
            "load_imbalance": one.load_imbalance,
            "drop_rate": one.drop_rate,
            "experts_per_token": one.experts_per_token,
            "width_per_token": one.width_per_token,
            "step_s": one.step_s,
            "looks_ahead": one.looks_ahead,
        }
        for one in outcomes
    ]


def write(path: Path, content: str | Mapping[str, Any]) -> None:
    """Write a picture, or a bench for programs.

    Raises:
        ResourceError: if the disk refuses.
    """
    text = content if isinstance(content, str) else json.dumps(content, indent=1) + "\n"
    try:
        if path.is_symlink() or (path.exists() and not path.is_file()):
            path.write_text(text)  # /dev/stdout and its like are written to, and not replaced
        else:
            replace_file(path, text)
    except OSError as error:
        raise ResourceError(f"{path}: cannot be written: {error.strerror}; name another file") from None


def _screen() -> Console:
    return Console(width=None if sys.stdout.isatty() else _WIDTH, highlight=False, markup=False)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("router", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _foot(screen: Console, legend: str, notes: Sequence[str]) -> None:
    for line in (legend, *(f"* {note}" for note in notes)):
        screen.print(line, style=QUIET, soft_wrap=True)


def _times_reference(seconds: float, of_all: Mapping[str, float]) -> float | None:
    return seconds / of_all[_REFERENCE] if _REFERENCE in of_all else None
