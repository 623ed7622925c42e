"""Entries take turns, so that a slow minute of the machine reaches all of them."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from trainer.lab.costs.interleaved import LocalRunner, Measured, interleave


class Recorded:
    """A runner that notes its turns, and fails in one of them."""

    def __init__(self, name: str, log: list[tuple[str, int]], fails_at: int | None = None) -> None:
        self.name, self.log, self.fails_at = name, log, fails_at

    def seconds(self, turn: int) -> float:
        if turn == self.fails_at:
            raise RuntimeError("not for this size\nsecond line")
        self.log.append((self.name, turn))
        return float(turn)

    def facts(self) -> dict[str, Any]:
        return {"name": self.name}


def test_every_round_runs_each_entry_once_and_starts_at_another_one() -> None:
    log: list[tuple[str, int]] = []
    list(interleave({name: Recorded(name, log) for name in "abc"}, rounds=3, warmup=1))
    turns = ["".join(name for name, turn in log if turn == number) for number in range(4)]
    assert turns == ["abc", "bca", "cab", "abc"]


def test_the_warm_up_does_not_count() -> None:
    ((name, measured, error),) = interleave({"a": Recorded("a", [])}, rounds=2, warmup=3)
    assert (name, error) == ("a", None)
    assert measured is not None and measured.seconds == (3.0, 4.0) and measured.facts == {"name": "a"}


@pytest.mark.parametrize("turn", [0, 2])
def test_an_entry_that_fails_is_left_out_with_its_reason(turn: int) -> None:
    log: list[tuple[str, int]] = []
    runners = {"a": Recorded("a", log), "b": Recorded("b", log, fails_at=turn)}
    (_, good, _), (name, measured, error) = interleave(runners, rounds=2, warmup=1)
    assert (name, measured, error) == ("b", None, "not for this size")
    assert good is not None and len(good.seconds) == 2
    assert [n for n, at in log if at > turn] == ["a"] * (2 - turn)


@pytest.mark.parametrize(
    ("mine", "theirs", "expected"),
    [([2.0, 9.0, 4.0], [1.0, 3.0, 4.0], (2.0, 1.0, 3.0)), ([1.0] * 8, [2.0] * 8, (0.5, 0.5, 0.5))],
)
def test_a_ratio_is_the_median_of_the_ratios_within_rounds(
    mine: Sequence[float], theirs: Sequence[float], expected: tuple[float, float, float]
) -> None:
    assert Measured(mine, {}).over(Measured(theirs, {})) == expected


def test_quartiles_leave_a_quarter_out_at_each_end() -> None:
    measured = Measured([8.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0], {})
    assert measured.middle_half == (3.0, 6.0) and measured.median_s == 4.5


def test_inputs_are_prepared_before_the_clock_starts() -> None:
    log: list[str] = []

    class Noted:
        def prepare(self, turn: int) -> None:
            log.append(f"prepare {turn}")

        def run(self) -> None:
            log.append("run")

        def facts(self) -> dict[str, Any]:
            return {}

    assert LocalRunner(Noted(), torch.device("cpu")).seconds(5) >= 0
    assert log == ["prepare 5", "run"]
