"""Trials for `tests.chaos.run`: one fault each, the checks after it and its measurements."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.data import epochs
from tests.chaos.disk import full_for_good, full_once
from tests.chaos.kills import WITH_BEST, Kill, kill_at, kill_at_random
from tests.chaos.rank_forker import Prepare, RankForker
from tests.chaos.removed_protections import OF_SPREAD_EXPERTS
from tests.chaos.stops import stop_at_random
from tests.chaos.workload import Outcome, Workload, outcome

Known = dict[tuple[int, int, tuple[str, ...]], tuple[Workload, Outcome]]
"""Ranks, ep_size and overrides: a run that was left alone, and what it has left behind."""


class TrialWorker:
    """State of a process that runs trials: a rank forker, and undisturbed runs to compare with."""

    def __init__(self, folder: Path, overrides: tuple[str, ...] = (), num_stages: int = 1) -> None:
        """Open it; `overrides` and stages are those of every run."""
        self.folder, self.forker, self.overrides = folder / f"worker-{os.getpid()}", RankForker(), overrides
        self.num_stages = num_stages
        self.known: Known = {}

    def undisturbed(self, world_size: int, ep_size: int, overrides: tuple[str, ...] = ()) -> tuple[Workload, Outcome]:
        """Return a run that was left alone, and what it has left behind."""
        key = (world_size, ep_size, overrides)
        if key not in self.known:
            folder = self.folder / f"undisturbed-{len(self.known)}"
            workload = Workload(folder, world_size, ep_size, overrides).prepare()
            wrong = workload.finish(self.forker)
            assert not wrong, wrong
            self.known[key] = workload, outcome(workload)
        return self.known[key]

    def workload(self, world_size: int = 2, ep_size: int = 2, *overrides: str) -> tuple[Workload, Workload, Outcome]:
        """Return a prepared run, the undisturbed one, and what both must leave behind.

        Experts are over the ranks of a stage at the most.
        """
        overrides, ep_size = (*self.overrides, *overrides), min(ep_size, max(1, world_size // self.num_stages))
        base, expected = self.undisturbed(world_size, ep_size, overrides)
        workload = Workload(self.folder / "trial", world_size, ep_size, overrides).prepare(like=base)
        return workload, base, expected


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Result of a trial."""

    wrong: list[str]
    figures: dict[str, float]


@dataclass(frozen=True, slots=True)
class Trial:
    """A fault, by a name, as a function and its arguments."""

    name: str
    function: Callable[..., Report]
    arguments: tuple[object, ...] = ()

    def run(self, worker: TrialWorker) -> Report:
        """Let it happen."""
        return self.function(worker, *self.arguments)


def killed(worker: TrialWorker, kill: Kill, layout: tuple[int, int]) -> Report:
    """Kill at a named place."""
    workload, _, expected = worker.workload(*layout)
    return Report(wrong=kill_at(worker.forker, workload, expected, kill), figures={})


def killed_with_best(worker: TrialWorker, kill: Kill) -> Report:
    """Kill at a named place where the best checkpoint is saved or another one removed."""
    workload, _, expected = worker.workload(2, 2, *WITH_BEST)
    kept = expected.state["best"]["step"], expected.state["steps"]
    wrong = [] if kept == (9, [9, 12, 15]) else [f"the undisturbed run keeps others: {kept}"]
    return Report(wrong=wrong + kill_at(worker.forker, workload, expected, kill), figures={})


def killed_at_random(worker: TrialWorker, num_kills: int, seed: int, layout: tuple[int, int]) -> Report:
    """Kill again and again."""
    workload, base, expected = worker.workload(*layout)
    wrong = kill_at_random(worker.forker, workload, base, expected, num_kills=num_kills, seed=seed)
    return Report(wrong=wrong, figures={"kills": num_kills})


def stopped(worker: TrialWorker, seed: int) -> Report:
    """Ask to stop."""
    workload, _, expected = worker.workload()
    wrong, took_s = stop_at_random(worker.forker, workload, expected, seed=seed)
    return Report(wrong=wrong, figures={"seconds to the end": took_s})


def full(worker: TrialWorker, fault: tuple[str, int, int]) -> Report:
    """Fill the disk for one save."""
    workload, _, expected = worker.workload()
    return Report(wrong=full_once(worker.forker, workload, expected, fault), figures={})


def stays_full(worker: TrialWorker, seed: int) -> Report:
    """Fill the disk and leave it full."""
    workload, _, expected = worker.workload()
    return Report(wrong=full_for_good(worker.forker, workload, expected, seed=seed), figures={})


def reads_epochs(worker: TrialWorker, num_kills: int, seed: int) -> Report:
    """Kill again and again over several epochs."""
    workload, base, expected = worker.workload(2, 2, "train.steps=75", "checkpoint.every=3", "eval.every=null")
    wrong = kill_at_random(worker.forker, workload, base, expected, num_kills=num_kills, seed=seed)
    more, num_epochs = epochs(workload)
    return Report(wrong=wrong + more, figures={"kills": num_kills, "whole epochs": num_epochs})


def control_killed(worker: TrialWorker, mutant: Prepare, kill: Kill, finding: str) -> Report:
    """Remove a protection and kill a run; check that the removal is detected as such."""
    # Where no rank has the experts of another one, none can take the wrong ones.
    world_size = 2 * worker.num_stages if mutant in OF_SPREAD_EXPERTS else 2
    workload, _, expected = worker.workload(world_size)
    return _noticed(kill_at(worker.forker, workload, expected, kill, mutant), finding)


def control_stopped(worker: TrialWorker, mutant: Prepare, finding: str) -> Report:
    """Remove a protection and stop runs until the removal is detected; check that it is detected as such."""
    found: list[str] = []
    for seed in range(6):
        workload, _, expected = worker.workload()
        found += stop_at_random(worker.forker, workload, expected, seed=seed, prepare=mutant)[0]
        if any(finding in text for text in found):
            break
    return _noticed(found, finding)


def _noticed(found: list[str], finding: str) -> Report:
    missed = [] if any(finding in text for text in found) else [f"nobody said {finding!r}, but {found}"]
    if any("the fault never came" in text for text in found):
        missed.append(found[0])
    return Report(wrong=missed, figures={"findings": len(found)})
