"""R1 and R2: kill ranks at every fault point and at random moments.

Only the steps since the last checkpoint may be lost, and they must be reproduced exactly.
"""

import random
import time
from dataclasses import dataclass

from tests.chaos.rank_forker import Prepare, RankForker
from tests.chaos.workload import LONGEST_S, Outcome, Workload, damage, differences, resumed_at

_SURVIVE_S = 30.0
"""Survivors end by themselves: parallel.timeout_s 12, 5 s more, and what a busy machine adds."""


@dataclass(frozen=True, slots=True)
class Kill:
    """Kill a rank when it reaches a fault point for the n-th time."""

    point: str
    time: int
    victim: int | None
    """None: every rank is."""
    after_resume: bool = False
    """In an attempt that goes on from a checkpoint, after one that was killed in step 13."""

    def __str__(self) -> str:
        who = "all ranks" if self.victim is None else f"rank {self.victim}"
        return f"{self.point}#{self.time}, {who}{', resumed' if self.after_resume else ''}"

    @property
    def planted(self) -> str:
        """As TURNOUT_FAULTS has it."""
        return f"{self.point}#{self.time}{'' if self.victim is None else f':{self.victim}'}=kill"


# At which time: where it matters in step 12 or the save of step 15. There are two ranks and two micro-batches.
EVERY_RANK = {
    "phase.locking_the_run_folder": 1, "phase.comparing_ranks": 1, "phase.reading_text": 1,
    "phase.building_the_model": 1, "phase.checking_the_experts_kernel": 1, "phase.placing_the_experts": 1,
    "phase.finding_a_checkpoint": 1, "phase.writing_the_run_folder": 1,
    "phase.resuming_the_logs": 1, "phase.opening_the_trackers": 1,
    "phase.data": 12, "phase.counting": 12, "phase.forward": 25, "phase.backward": 24, "phase.gradient_sums": 12,
    "phase.update": 12, "phase.router_update": 13, "phase.checking_the_step": 14, "phase.agreeing_on_a_stop": 12,
    "phase.logging": 12, "phase.writing_metrics": 12, "phase.ending_the_step": 12, "phase.comparing_copies": 4,
    "phase.evaluation": 2, "phase.evaluation_batch": 4, "phase.writing_the_evaluation": 2,
    "phase.writing_predictions": 2, "phase.saving": 3, "phase.between_steps": 15, "phase.sampling": 1,
    "collective.begin": 150, "collective.end": 151,
    "save.planned": 3, "save.snapshot": 3, "save.before_file": 4, "save.mid_file": 4, "save.file_written": 4,
    "save.file_synced": 4, "save.before_vote": 3, "save.voted": 3, "save.finished": 3,
}  # fmt: skip
FIRST_RANK = {
    "phase.removing_old_status_files": 1, "phase.recording_the_environment": 1, "resume.cleaned": 1,
    "save.folder_made": 3, "save.before_manifest": 3, "save.folder_synced": 3, "save.before_rename": 3,
    "save.renamed": 3, "save.committed": 3, "prune.begin": 3, "remove.out_of_sight": 1, "remove.done": 2,
    "prune.done": 3, "phase.summary": 1, "report.page": 1,
}  # fmt: skip
RESUMED_EVERY_RANK = (
    "resume.candidate", "resume.checked", "phase.loading_the_checkpoint", "phase.writing_the_run_folder",
)  # fmt: skip
RESUMED_FIRST_RANK = ("phase.resuming_the_logs",)
NEVER_THERE = {
    "phase.finding_what_is_not_finite", "phase.verifying_the_weights_to_start_from", "phase.writing_the_first_weights",
    "phase.copying_a_checkpoint", "branch.checkpoint_copied", "branch.written",
    "phase.resuming_the_routing_record", "phase.recording_experts", "phase.writing_the_routing_record",
    "phase.finishing_the_routing_record", "routing_record.written", "routing_record.before_manifest",
}  # fmt: skip
"""Only where a loss or gradient is not finite, with `init_from` (tests/unit/convert/test_init_weights.py), with
`--branch` (tests/unit/checkpoint/test_branch.py), or with `metrics.routing_record`
(tests/unit/routing_record/test_record_reader.py, tests/unit/training/test_routing_recorder.py)."""
WITH_BEST = (
    "checkpoint.best={metric: eval/expert_domain_mi, mode: min}", "train.ema={decay: 0.5}", "train.steps=15",
    "checkpoint.every=4", "eval.every=3", "eval.max_tokens_per_domain=64",
)  # fmt: skip
"""The best of such a run is that of step 3, then that of step 9, the fourth that is saved: of steps 3, 4, 8, 9, 12, 15.
Then that of step 3 is the first one to be removed, and that of step 9 stays beside the last two."""
AROUND_THE_BEST = {
    "phase.evaluation": 3, "phase.writing_the_evaluation": 3, "phase.saving": 4, "save.planned": 4,
    "save.before_vote": 4, "save.voted": 4, "save.finished": 4,
}  # fmt: skip
REMOVING_THE_BEST = {
    "save.before_manifest": 4, "save.before_rename": 4, "save.renamed": 4, "save.committed": 4, "prune.begin": 4,
    "remove.out_of_sight": 1, "remove.done": 1, "prune.done": 4,
}  # fmt: skip
POINTS = {*EVERY_RANK, *FIRST_RANK, *RESUMED_EVERY_RANK, *RESUMED_FIRST_RANK}


def all_kills() -> list[Kill]:
    """Return kills at every fault point: of each rank and of all ranks where all reach it."""
    return [
        *(Kill(point, at, victim) for point, at in EVERY_RANK.items() for victim in (0, 1, None)),
        *(Kill(point, at, 0) for point, at in FIRST_RANK.items()),
        *(Kill(point, 1, victim, after_resume=True) for point in RESUMED_EVERY_RANK for victim in (0, 1, None)),
        *(Kill(point, 1, 0, after_resume=True) for point in RESUMED_FIRST_RANK),
    ]


def kills_around_the_best() -> list[Kill]:
    """Return kills of a run `WITH_BEST` where a best checkpoint is found, saved, takes another's place, and stays."""
    return [
        *(Kill(point, at, victim) for point, at in AROUND_THE_BEST.items() for victim in (1, None)),
        *(Kill(point, at, 0) for point, at in REMOVING_THE_BEST.items()),
        *(Kill("prune.begin", at, 0) for at in (3, 6)),
    ]


def kill_at(
    forker: RankForker, workload: Workload, expected: Outcome, kill: Kill, prepare: Prepare | None = None
) -> list[str]:
    """Kill a run at a fault point, resume it and return the errors found.

    Args:
        forker: starts ranks.
        workload: a prepared folder.
        expected: what an undisturbed run leaves behind.
        kill: where and whom. If only one rank is killed the others are to end by themselves.
        prepare: a negative control, in every attempt.
    """
    wrong = []
    if kill.after_resume:
        workload.start(forker, planted="phase.agreeing_on_a_stop#13=kill", prepare=prepare).settle(seconds=LONGEST_S)
    attempt = workload.start(forker, planted=kill.planted, prepare=prepare)
    codes = attempt.settle(seconds=LONGEST_S, lets_survivors_end=kill.victim is not None)
    victims = range(workload.world_size) if kill.victim is None else [kill.victim]
    if not any(codes[rank] == -9 for rank in victims):
        wrong.append(f"the fault never came: {codes} {attempt.said()[-500:]}")
    if None in codes:
        wrong.append(f"hung: {codes}")
    survivors = [code for rank, code in enumerate(codes) if rank not in victims]
    if any(code not in (0, 5) for code in survivors):
        wrong.append(f"survivors ended with {survivors}: {attempt.said()[-500:]}")
    wrong += damage(workload)
    newest = max(workload.checkpoints.steps(), default=0)
    wrong += workload.finish(forker, prepare=prepare)
    if resumed_at(workload) != newest:
        wrong.append(f"went on from {resumed_at(workload)}, though {newest} was saved")
    return wrong + differences(workload, expected)


def kill_at_random(
    forker: RankForker, workload: Workload, base: Workload, expected: Outcome, *, num_kills: int, seed: int
) -> list[str]:
    """Kill one rank or several of a run repeatedly, at random moments; return the errors found.

    Moments are counted from the first logged step of an attempt, since most kills would otherwise hit imports.
    """
    wrong, draw, done = [], random.Random(seed), 0
    while done < num_kills:
        attempt = workload.start(forker)
        metrics = workload.run / "metrics.jsonl"
        size = metrics.stat().st_size if metrics.exists() else 0
        attempt.wait(seconds=LONGEST_S, until=lambda: metrics.exists() and metrics.stat().st_size != size)  # noqa: B023
        time.sleep(draw.uniform(0.0, 0.7))
        victims = [rank for rank in range(workload.world_size) if draw.random() < 0.5] or [
            draw.randrange(workload.world_size)
        ]
        is_over = len(attempt.poll()) == workload.world_size
        attempt.kill(victims)
        end_alone = len(victims) < workload.world_size and draw.random() < 0.2
        codes = attempt.settle(seconds=_SURVIVE_S if end_alone else LONGEST_S, lets_survivors_end=end_alone)
        if None in codes:
            wrong.append(f"hung after kill {done}: {codes} {attempt.said()[-500:]}")
        wrong += damage(workload)
        if -9 in codes and not is_over:
            done += 1
        else:  # it was quicker than the kill: compare, and begin another one
            wrong += differences(workload, expected)
            workload.prepare(like=base)
    wrong += workload.finish(forker)
    return wrong + differences(workload, expected)
