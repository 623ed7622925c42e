"""R14: the disk is full when a checkpoint is saved. Training goes on, what was saved before stays, nothing is left."""

import random

from tests.chaos.rank_forker import Arena
from tests.chaos.workload import LONGEST_S, STEPS, Course, Outcome, damage, differences

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


def full_once(arena: Arena, course: Course, expected: Outcome, fault: tuple[str, int, int]) -> list[str]:
    """Let one save find a full disk; return what is wrong."""
    point, at, rank = fault
    attempt = course.start(arena, planted=f"{point}#{at}:{rank}=full")
    codes, said = attempt.settle(seconds=LONGEST_S), attempt.said()
    wrong = damage(course)
    if set(codes) != {0}:
        wrong.append(f"ended with {codes}: {said[-800:]}")
    if said.count("not saved") != 1 or "No space left on device" not in said:
        wrong.append(f"the failed save was told {said.count('not saved')} times")
    return wrong + differences(course, expected)


def full_for_good(arena: Arena, course: Course, expected: Outcome, *, seed: int) -> list[str]:
    """Let no file grow beyond a random size, then let it again; return what is wrong.

    Files of metrics are smaller than any of these sizes, so that checkpoints alone are refused.
    """
    largest = random.Random(seed).randrange(24_000, 40_000)
    course.start(arena, planted="phase.agreeing_on_a_stop#13=kill").settle(seconds=LONGEST_S)
    before = course.checkpoints.steps()
    attempt = course.start(arena, largest_file=largest)
    codes, said = attempt.settle(seconds=LONGEST_S, lets_survivors_end=True), attempt.said()
    wrong = damage(course)
    if set(codes) != {7}:
        wrong.append(f"with files of at most {largest} bytes it ended with {codes}: {said[-800:]}")
    if course.checkpoints.steps() != before:
        wrong.append(f"had {before}, has {course.checkpoints.steps()}")
    if f"step {STEPS} not saved" not in said or "trying again in 1 s" not in said:
        wrong.append(f"did not say so: {said[-800:]}")
    wrong += course.finish(arena)
    return wrong + differences(course, expected)
