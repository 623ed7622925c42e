"""R10: runs are asked to stop at random moments, once they listen. They save, exit with 75, and lose no step."""

import random
import signal
import time

from tests.chaos.rank_forker import Arena, Prepare
from tests.chaos.workload import LONGEST_S, Course, Outcome, damage, differences, resumed_at
from trainer.trackers.jsonl import read_jsonl

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def stop_at_random(
    arena: Arena, course: Course, expected: Outcome, *, seed: int, prepare: Prepare | None = None
) -> tuple[list[str], float]:
    """Stop a run, go on with it, and return what is wrong and how long it took to end, in seconds."""
    wrong, draw = [], random.Random(seed)
    attempt = course.start(arena, prepare=prepare)
    metrics = course.run / "metrics.jsonl"
    attempt.wait(seconds=LONGEST_S, until=attempt.listens)
    if draw.random() < 0.8:  # else at any moment from here on
        attempt.wait(seconds=LONGEST_S, until=lambda: metrics.exists() and metrics.stat().st_size > 0)
    time.sleep(draw.uniform(0.0, 0.6))
    asked = range(course.world_size) if draw.random() < 0.5 else [draw.randrange(course.world_size)]
    is_over = len(attempt.poll()) > 0
    attempt.kill(asked, draw.choice(SIGNALS))
    began = time.monotonic()
    attempt.wait(seconds=30.0, until=lambda: any(attempt.codes.values()))
    attempt.kill(range(course.world_size), signal.SIGTERM)  # as torchrun does when the first rank has ended
    attempt.wait(seconds=30.0)
    took_s = time.monotonic() - began
    codes = attempt.settle(seconds=1.0)
    if not is_over and set(codes) not in ({75}, {0}):  # 0: it was in its last step
        wrong.append(f"asked {list(asked)} to stop, ended with {codes}: {attempt.said()[-800:]}")
    wrong += damage(course)
    steps = [record["step"] for record in read_jsonl(metrics)] if metrics.exists() else []
    wrong += course.finish(arena, prepare=prepare)
    if set(codes) == {75} and resumed_at(course) != max(steps, default=0):
        wrong.append(f"{max(steps, default=0)} steps were done, and it went on from {resumed_at(course)}")
    return wrong + differences(course, expected), took_s
