"""Contenders of one comparison: entries here or in other processes, and those that cannot take part."""

from collections.abc import Sequence
from dataclasses import dataclass

from trainer.lab.costs.cost_report import CostEntry
from trainer.lab.costs.interleaved import Runner, interleave

_WARMUP = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """An entry with what its line says."""

    name: str
    """Such as `turnout, fused`; with routing and experts it is unique in its comparison."""
    routing: str
    num_experts: int
    runner: Runner | str
    """The reason if it cannot run."""


def measure(contenders: Sequence[Contender], *, rounds: int) -> list[CostEntry]:
    """Let all contenders take turns; return their lines, in the given order. Without rounds only facts are measured."""
    runners = {str(n): one.runner for n, one in enumerate(contenders) if not isinstance(one.runner, str)}
    turns = interleave(runners, rounds=rounds, warmup=_WARMUP if rounds else 1)
    found = {name: (measured, error) for name, measured, error in turns}
    lines = []
    for number, one in enumerate(contenders):
        measured, error = (None, one.runner) if isinstance(one.runner, str) else found[str(number)]
        lines.append(
            CostEntry(
                contender=one.name,
                routing=one.routing,
                num_experts=one.num_experts,
                measured=measured,
                error=error,
            )
        )
    return lines
