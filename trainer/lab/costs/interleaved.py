"""Time entries in turn, so that a drift of the machine's speed reaches all of them alike."""

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from trainer.errors import first_line

_PAUSE_S = 0.02  # idle threads of the one before have stopped spinning


class Entry(Protocol):
    """One of the things that are compared: something that can be run again and again."""

    def prepare(self, turn: int) -> None:
        """Make the inputs of a run, which are the same for every entry of a comparison; not timed."""
        ...

    def run(self) -> None:
        """Do what is timed."""
        ...

    def facts(self) -> dict[str, Any]:
        """Measure what does not depend on the time: bytes, waits, sizes."""
        ...


class Runner(Protocol):
    """Runs one entry, here or in other processes."""

    def seconds(self, turn: int) -> float:
        """Run the entry once and return how long it took."""
        ...

    def facts(self) -> dict[str, Any]:
        """Return the entry's facts."""
        ...


@dataclass(frozen=True, slots=True)
class LocalRunner:
    """Runs an entry in this process."""

    entry: Entry
    device: torch.device

    def seconds(self, turn: int) -> float:
        """Run the entry once, from idle to idle."""
        self.entry.prepare(turn)
        _settle(self.device)
        start = time.perf_counter()
        self.entry.run()
        _settle(self.device)
        return time.perf_counter() - start

    def facts(self) -> dict[str, Any]:
        """Return the entry's facts."""
        return self.entry.facts()


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True, slots=True)
class Measured:
    """Times of one entry, and what else was measured of it."""

    seconds: Sequence[float]
    """Of each counted round."""
    facts: Mapping[str, Any]

    @property
    def median_s(self) -> float:
        """Median time."""
        return statistics.median(self.seconds)

    @property
    def middle_half(self) -> tuple[float, float]:
        """First and third quartile of the times."""
        return _quartiles(self.seconds)

    def over(self, other: "Measured") -> tuple[float, float, float]:
        """Return the time over that of another entry in the same round: median, first and third quartile."""
        ratios = [a / b for a, b in zip(self.seconds, other.seconds, strict=True)]
        return statistics.median(ratios), *_quartiles(ratios)


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    ordered, quarter = sorted(values), len(values) // 4
    return ordered[quarter], ordered[-1 - quarter]


def interleave(
    runners: Mapping[str, Runner], *, rounds: int, warmup: int
) -> Iterator[tuple[str, Measured | None, str | None]]:
    """Run every entry once a round, each round from another one on; yield its name and its measurement or its error.

    The rounds of the warm-up, in which kernels are built, do not count. Facts are measured after the last round. An
    entry that fails is left out from then on; the command line's own errors are not caught.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    errors: dict[str, str] = {}
    for turn in range(warmup + rounds):
        for name in _from(list(runners), turn):
            if name in errors:
                continue
            try:
                took = runners[name].seconds(turn)
            except (RuntimeError, NotImplementedError) as error:  # a kernel that does not support this
                errors[name] = first_line(error)
                continue
            time.sleep(_PAUSE_S)
            if turn >= warmup:
                seconds[name].append(took)
    for name, runner in runners.items():
        if name in errors:
            yield name, None, errors[name]
        else:
            yield name, Measured(tuple(seconds[name]), runner.facts()), None


def _from(names: list[str], turn: int) -> list[str]:
    first = turn % len(names) if names else 0
    return names[first:] + names[:first]
