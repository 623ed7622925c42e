"""Trials: one fault each, what must hold after it, and the figures it gives. `tests.chaos.run` runs them."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.data import epochs
from tests.chaos.disk import full_for_good, full_once
from tests.chaos.kills import Kill, kill_at, kill_at_random
from tests.chaos.rank_forker import Arena, Prepare
from tests.chaos.stops import stop_at_random
from tests.chaos.workload import Course, Outcome, outcome

Known = dict[tuple[int, int, tuple[str, ...]], tuple[Course, Outcome]]
"""Ranks, ep_size and overrides: a run that was left alone, and what it has left behind."""


class Lane:
    """What a process needs to run trials one after another: an arena, and undisturbed runs to compare with."""

    def __init__(self, folder: Path, overrides: tuple[str, ...] = ()) -> None:
        """Open it; `overrides` are those of every run."""
        self.folder, self.arena, self.overrides = folder / f"lane-{os.getpid()}", Arena(), overrides
        self.known: Known = {}

    def undisturbed(self, world_size: int, ep_size: int, overrides: tuple[str, ...] = ()) -> tuple[Course, Outcome]:
        """Return a run that was left alone, and what it has left behind."""
        key = (world_size, ep_size, overrides)
        if key not in self.known:
            folder = self.folder / f"undisturbed-{len(self.known)}"
            course = Course(folder, world_size, ep_size, overrides).prepare()
            wrong = course.finish(self.arena)
            assert not wrong, wrong
            self.known[key] = course, outcome(course)
        return self.known[key]

    def course(self, world_size: int = 2, ep_size: int = 2, *overrides: str) -> tuple[Course, Course, Outcome]:
        """Return a prepared run, the undisturbed one, and what both must leave behind."""
        overrides = (*self.overrides, *overrides)
        base, expected = self.undisturbed(world_size, ep_size, overrides)
        course = Course(self.folder / "trial", world_size, ep_size, overrides).prepare(like=base)
        return course, base, expected


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What came of a trial."""

    wrong: list[str]
    figures: dict[str, float]


@dataclass(frozen=True, slots=True)
class Trial:
    """A fault, by a name, as a function and its arguments."""

    name: str
    function: Callable[..., Report]
    arguments: tuple[object, ...] = ()

    def run(self, lane: Lane) -> Report:
        """Let it happen."""
        return self.function(lane, *self.arguments)


def killed(lane: Lane, kill: Kill, layout: tuple[int, int]) -> Report:
    """Kill at a named place."""
    course, _, expected = lane.course(*layout)
    return Report(wrong=kill_at(lane.arena, course, expected, kill), figures={})


def killed_at_random(lane: Lane, num_kills: int, seed: int, layout: tuple[int, int]) -> Report:
    """Kill again and again."""
    course, base, expected = lane.course(*layout)
    wrong = kill_at_random(lane.arena, course, base, expected, num_kills=num_kills, seed=seed)
    return Report(wrong=wrong, figures={"kills": num_kills})


def stopped(lane: Lane, seed: int) -> Report:
    """Ask to stop."""
    course, _, expected = lane.course()
    wrong, took_s = stop_at_random(lane.arena, course, expected, seed=seed)
    return Report(wrong=wrong, figures={"seconds to the end": took_s})


def full(lane: Lane, fault: tuple[str, int, int]) -> Report:
    """Fill the disk for one save."""
    course, _, expected = lane.course()
    return Report(wrong=full_once(lane.arena, course, expected, fault), figures={})


def stays_full(lane: Lane, seed: int) -> Report:
    """Fill the disk and leave it full."""
    course, _, expected = lane.course()
    return Report(wrong=full_for_good(lane.arena, course, expected, seed=seed), figures={})


def reads_epochs(lane: Lane, num_kills: int, seed: int) -> Report:
    """Kill again and again over several epochs."""
    course, base, expected = lane.course(2, 2, "train.steps=75", "checkpoint.every=3", "eval.every=null")
    wrong = kill_at_random(lane.arena, course, base, expected, num_kills=num_kills, seed=seed)
    more, num_epochs = epochs(course)
    return Report(wrong=wrong + more, figures={"kills": num_kills, "whole epochs": num_epochs})


def control_killed(lane: Lane, mutant: Prepare, kill: Kill, finding: str) -> Report:
    """Break a protection, kill, and see whether it is noticed for what it is."""
    course, _, expected = lane.course()
    return _noticed(kill_at(lane.arena, course, expected, kill, mutant), finding)


def control_stopped(lane: Lane, mutant: Prepare, finding: str) -> Report:
    """Break a protection, ask runs to stop until it is noticed, and see whether that is for what it is."""
    found: list[str] = []
    for seed in range(6):
        course, _, expected = lane.course()
        found += stop_at_random(lane.arena, course, expected, seed=seed, prepare=mutant)[0]
        if any(finding in text for text in found):
            break
    return _noticed(found, finding)


def _noticed(found: list[str], finding: str) -> Report:
    missed = [] if any(finding in text for text in found) else [f"nobody said {finding!r}, but {found}"]
    if any("the fault never came" in text for text in found):
        missed.append(found[0])
    return Report(wrong=missed, figures={"findings": len(found)})
