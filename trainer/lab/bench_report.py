"""Print the router benchmarks as tables, and return them as JSON values."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from trainer.console import formatting
from trainer.console.result_tables import result_screen, result_table
from trainer.console.style import QUIET
from trainer.evaluation.routing_optimum import Optimality
from trainer.lab.logits import LogitsKind
from trainer.lab.router_choices import FACTORS, Choice
from trainer.lab.training_outcomes import TrainingOutcome

_REFERENCE = "top_k"
_CHOICES_LEGEND = """\
k        experts per token in the optimal programme
asked    mean number of experts a token asked for, before drops
kept     total softmax score of the choices, over the largest total with k experts per token and an expert
         capacity of 1 fair share of a sequence (or 1.25); choices are first limited likewise: a token's best
         k experts, then an expert's first tokens
gap      1 - kept, at a capacity of 1 fair share
busiest  load of the busiest expert over the mean, before drops, in the worst layer
drop     share of k experts per token that was not reached: expert full, or not asked for
x top_k  time per call over that of top_k: medians of interleaved rounds, on the CPU, without gradients"""
_OUTCOMES_LEGEND = """\
held out final loss in nats per token, mean over seeds, with the router's evaluation routing
+-       standard deviation over seeds
busiest  load of the busiest expert over the mean, in the worst layer; this and the next three are means over
         the last tenth of the steps
drop     share of assignments over capacity
asked    experts a token asked for, before drops
width    hidden units computed per token: asked times the width of an expert
x top_k  median step time over that of top_k; trainings run one after the other, so keep the machine idle
ahead    a token's experts depend on later tokens: no, in training, or always (its held-out loss is too low)"""

_CHOICE_KEYS = ("router", "logits", "top_k", "experts_per_token", "load_imbalance", "call_s")
_MEASURED_KEYS = ("gap", "drop_rate", "optimum_drop_rate")
_OUTCOME_KEYS = ("router", "held_out_loss", "held_out_losses", "load_imbalance", "drop_rate", "experts_per_token")
_OUTCOME_KEYS += ("width_per_token", "step_s", "looks_ahead")


def show_choices(choices: Sequence[Choice], titles: Mapping[LogitsKind, str], *, notes: Sequence[str]) -> None:
    """Print a table with its title for each kind of logits, then footnotes."""
    screen = result_screen()
    columns = ("k", "asked", "kept 1.0", "kept 1.25", "gap", "busiest", "drop 1.0", "drop 1.25", "ms", "x top_k")
    for kind, title in titles.items():
        of_kind = [choice for choice in choices if choice.logits == kind]
        table = result_table(title, "router", *columns)
        for choice in of_kind:
            fair, more = (choice.at[factor] for factor in FACTORS)
            table.add_row(
                choice.router,
                str(choice.top_k),
                formatting.number(choice.experts_per_token, digits=2),
                *(formatting.number(1 - measured.gap, digits=4) for measured in (fair, more)),
                formatting.percent(max(0.0, fair.gap)),  # rounding can make it slightly negative
                formatting.number(choice.load_imbalance, digits=2),
                *(formatting.percent(measured.drop_rate) for measured in (fair, more)),
                formatting.number(choice.call_s * 1e3, digits=2),
                formatting.ratio(_relative_time(choice.call_s, {one.router: one.call_s for one in of_kind})),
            )
        screen.print(table)
    _print_footnotes(screen, _CHOICES_LEGEND, notes)


def show_outcomes(outcomes: Sequence[TrainingOutcome], title: str, *, notes: Sequence[str]) -> None:
    """Print a table of training outcomes, a line for each router."""
    screen = result_screen()
    table = result_table(
        title, "router", "held out", "+-", "busiest", "drop", "asked", "width", "step ms", "x top_k", "ahead"
    )
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
            formatting.ratio(_relative_time(one.step_s, step_s)),
            one.looks_ahead,
        )
    screen.print(table)
    _print_footnotes(screen, _OUTCOMES_LEGEND, notes)


def choices_record(choices: Sequence[Choice]) -> list[dict[str, Any]]:
    """Return the choices as JSON values."""
    return [
        {key: getattr(choice, key) for key in _CHOICE_KEYS}
        | {"at": {str(factor): _measured_record(measured) for factor, measured in choice.at.items()}}
        for choice in choices
    ]


def _measured_record(measured: Optimality) -> dict[str, float]:
    return {"score_kept": 1 - measured.gap} | {key: getattr(measured, key) for key in _MEASURED_KEYS}


def outcomes_record(outcomes: Sequence[TrainingOutcome]) -> list[dict[str, Any]]:
    """Return the outcomes as JSON values."""
    return [{key: getattr(one, key) for key in _OUTCOME_KEYS} for one in outcomes]


def _print_footnotes(screen: Console, legend: str, notes: Sequence[str]) -> None:
    for line in (legend, *(f"* {note}" for note in notes)):
        screen.print(line, style=QUIET, soft_wrap=True)


def _relative_time(seconds: float, of_all: Mapping[str, float]) -> float | None:
    return seconds / of_all[_REFERENCE] if _REFERENCE in of_all else None
