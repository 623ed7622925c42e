"""Chaos suite: inject every fault of docs/reliability.md and compare the results with an undisturbed run.

    python -m tests.chaos.run                       the short form, two or three minutes
    python -m tests.chaos.run --release             the numbers that docs/reliability.md states
    python -m tests.chaos.run --only kills --seed 3
    python -m tests.chaos.run --engine zero1        under DeepSpeed
    python -m tests.chaos.run --beside pp           with stages; cp: with shared rows; tp: with shared heads

Ends with 1 if anything was lost, hung or undetected, or a negative control was not noticed.
"""

import argparse
import json
import multiprocessing
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import median

import torch

from tests.chaos.disk import FULL_AT
from tests.chaos.kills import all_kills, kills_around_the_best
from tests.chaos.removed_protections import KILLED, STOPPED
from tests.chaos.scenarios import (
    Known,
    Report,
    Trial,
    TrialWorker,
    control_killed,
    control_stopped,
    full,
    killed,
    killed_at_random,
    killed_with_best,
    reads_epochs,
    stays_full,
    stopped,
)
from trainer.engine.deepspeed.start import load_deepspeed

LAYOUTS = [(1, 1), (2, 2), (4, 4), (4, 2)]
"""Ranks and ep_size."""
BESIDE = {
    "none": (),
    "cp": ("parallel.cp_size=2", "parallel.cp=ring"),
    "pp": ("parallel.pp_size=2",),
    "tp": ("parallel.tp_size=2",),
}
"""Further degrees of every run, of at least two ranks."""
NUM_STAGES = {"pp": 2}


@dataclass(slots=True)
class Result:
    """How the trials of a scenario went."""

    scenario: str
    trials: int = 0
    wrong: list[str] = field(default_factory=list)
    figures: dict[str, list[float]] = field(default_factory=dict)
    seconds: float = 0.0

    def line(self) -> str:
        """Return a row of the table."""
        figures = "; ".join(f"{name}: {_shown(values)}" for name, values in self.figures.items())
        return (
            f"| {self.scenario} | {self.trials} | {self.trials - len(self.wrong)} | {figures} | {self.seconds:.0f} s |"
        )


def scenarios(*, release: bool, seed: int, layouts: Sequence[tuple[int, int]] = LAYOUTS) -> dict[str, list[Trial]]:
    """Return the trials of every scenario."""
    draw = random.Random(seed)
    kills = all_kills() if release else _some(draw, all_kills(), 14)
    num_random = {"runs": 25, "kills": 8} if release else {"runs": 2, "kills": 5}
    stops, spaces, rounds = (20, 10, 3) if release else (3, 1, 1)
    return {
        "kills at named places": [Trial(str(kill), killed, (kill, (2, 2))) for kill in kills],
        "kills around the best checkpoint": [
            Trial(str(kill), killed_with_best, (kill,))
            for kill in (kills_around_the_best() if release else _some(random.Random(seed), kills_around_the_best(), 2))
        ],
        "kills at random": [
            Trial(f"seed {seed + i}", killed_at_random, (num_random["kills"], seed + i, layouts[i % len(layouts)]))
            for i in range(num_random["runs"])
        ],
        "stops at random": [Trial(f"seed {seed + i}", stopped, (seed + i,)) for i in range(stops)],
        "disk full for one save": [
            Trial(f"{fault}", full, (fault,))
            for fault in (FULL_AT if release else [*_some(draw, FULL_AT[:-1], 2), FULL_AT[-1]])
        ],
        "disk full for good": [Trial(f"seed {seed + i}", stays_full, (seed + i,)) for i in range(spaces)],
        "epochs under kills": [
            Trial(f"seed {seed + i}", reads_epochs, (6 if release else 3, seed + i)) for i in range(rounds)
        ],
        "negative controls": [
            *(Trial(mutant.__name__, control_killed, (mutant, *how)) for mutant, how in KILLED.items()),
            *(Trial(mutant.__name__, control_stopped, (mutant, finding)) for mutant, finding in STOPPED.items()),
        ],
    }


def _some(draw: random.Random, everything: list, number: int) -> list:
    return draw.sample(everything, number)


_lane: TrialWorker
"""Of this process, which runs one trial at a time."""


def _open_worker(folder: Path, engine: str, beside: str) -> None:
    global _lane
    torch.set_num_threads(1)
    overrides: tuple[str, ...] = BESIDE[beside]
    if engine != "native":
        load_deepspeed(torch.device("cpu"))  # once: every rank is a fork
        overrides += ("engine.kind=deepspeed", f"engine.zero_stage={engine.removeprefix('zero')}")
    _lane = TrialWorker(folder, overrides, NUM_STAGES.get(beside, 1))


def _undisturbed() -> Known:
    """Run the undisturbed training that most trials are compared with, once for all workers."""
    _lane.workload()
    return _lane.known


def _run(known: Known, trial: Trial) -> Report:
    _lane.known |= known
    try:
        return trial.run(_lane)
    except Exception as error:
        return Report(wrong=[f"{type(error).__name__}: {error}"], figures={})


def run_scenario(name: str, trials: list[Trial], pool: Executor, known: Known) -> Result:
    """Run trials in parallel and count the results; a trial mostly waits."""
    result, began = Result(name), time.monotonic()
    for trial, report in zip(trials, pool.map(partial(_run, known), trials), strict=True):
        result.trials += 1
        if report.wrong:
            result.wrong.append(f"{trial.name}: {'; '.join(report.wrong)}")
            print(f"WRONG {result.wrong[-1][:2000]}", flush=True)
        for key, value in report.figures.items():
            result.figures.setdefault(key, []).append(value)
    result.seconds = time.monotonic() - began
    print(result.line(), flush=True)
    return result


def _workers(options: argparse.Namespace, folder: Path) -> Executor:
    """Fork processes that run trials, before this one computes anything (see RankForker)."""
    context = multiprocessing.get_context("fork")
    return ProcessPoolExecutor(
        options.workers, mp_context=context, initializer=_open_worker, initargs=(folder, options.engine, options.beside)
    )


def _shown(values: list[float]) -> str:
    if all(value == int(value) for value in values):
        return f"{sum(values):.0f}"
    return f"median {median(values):.1f}, most {max(values):.1f}"


def main() -> int:
    """Run the selected scenarios; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--release", action="store_true", help="the long form")
    parser.add_argument("--only", action="append", metavar="TEXT", help="scenarios whose name has this text, or one of")
    parser.add_argument("--trial", default="", metavar="TEXT", help="trials whose name has this text")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--engine", choices=["native", "zero1", "zero2"], default="native", help="of every run (native)"
    )
    parser.add_argument("--beside", choices=list(BESIDE), default="none", help="further degrees of every run (none)")
    parser.add_argument("--workers", type=int, default=3, help="trials side by side (3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results as JSON as well")
    options = parser.parse_args()
    results = []
    print("| scenario | trials | as it must be | figures | time |\n|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory(prefix="chaos-") as folder, _workers(options, Path(folder)) as pool:
        known = pool.submit(_undisturbed).result()
        layouts = LAYOUTS if options.beside == "none" else LAYOUTS[1:]
        for name, trials in scenarios(release=options.release, seed=options.seed, layouts=layouts).items():
            chosen = [trial for trial in trials if options.trial in trial.name]
            if chosen and any(text in name for text in options.only or [""]):
                results.append(run_scenario(name, chosen, pool, known))
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")
    return 1 if any(result.wrong for result in results) or not results else 0


if __name__ == "__main__":
    sys.exit(main())
