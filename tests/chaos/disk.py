"""R14: the disk is full during a save. Training continues, earlier checkpoints stay and no leftovers remain."""

import random

from tests.chaos.rank_forker import RankForker
from tests.chaos.workload import LONGEST_S, STEPS, Outcome, Workload, damage, differences

# Every write of a save, by any rank; the third save is that of step 15, which has others before and behind it. The last
# two are of the last save, which is tried again.
FULL_AT = [
    *((point, at, rank) for point, at in (("save.before_file", 4), ("save.mid_file", 4)) for rank in (0, 1)),
    *(
        (point, 3, 0)
        for point in ("save.folder_made", "save.before_manifest", "save.folder_synced", "save.before_rename")
    ),
    ("save.before_rename", 6, 0),
    ("save.mid_file", 6, 1),
]


def full_once(forker: RankForker, workload: Workload, expected: Outcome, fault: tuple[str, int, int]) -> list[str]:
    """Fill the disk during one save; return the errors found."""
    point, at, rank = fault
    attempt = workload.start(forker, planted=f"{point}#{at}:{rank}=full")
    codes, said = attempt.settle(seconds=LONGEST_S), attempt.said()
    wrong = damage(workload)
    if set(codes) != {0}:
        wrong.append(f"ended with {codes}: {said[-800:]}")
    if said.count("not saved") != 1 or "No space left on device" not in said:
        wrong.append(f"the failed save was told {said.count('not saved')} times")
    return wrong + differences(workload, expected)


def full_for_good(forker: RankForker, workload: Workload, expected: Outcome, *, seed: int) -> list[str]:
    """Limit files to a random size, then lift the limit; return the errors found.

    Metrics files stay below all of these sizes, so that only checkpoints fail.
    """
    largest = random.Random(seed).randrange(24_000, 40_000)
    workload.start(forker, planted="phase.agreeing_on_a_stop#13=kill").settle(seconds=LONGEST_S)
    before = workload.checkpoints.steps()
    attempt = workload.start(forker, largest_file=largest)
    codes, said = attempt.settle(seconds=LONGEST_S, lets_survivors_end=True), attempt.said()
    wrong = damage(workload)
    if set(codes) != {7}:
        wrong.append(f"with files of at most {largest} bytes it ended with {codes}: {said[-800:]}")
    if workload.checkpoints.steps() != before:
        wrong.append(f"had {before}, has {workload.checkpoints.steps()}")
    if f"step {STEPS} not saved" not in said or "trying again in 1 s" not in said:
        wrong.append(f"did not say so: {said[-800:]}")
    wrong += workload.finish(forker)
    return wrong + differences(workload, expected)
