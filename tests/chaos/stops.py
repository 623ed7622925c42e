"""R10: stop runs by signals at random moments. They save, exit with 75 and lose no step."""

import random
import signal
import time

from tests.chaos.rank_forker import Prepare, RankForker
from tests.chaos.workload import LONGEST_S, Outcome, Workload, damage, differences, resumed_at
from trainer.trackers.jsonl import read_jsonl

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def stop_at_random(
    forker: RankForker, workload: Workload, expected: Outcome, *, seed: int, prepare: Prepare | None = None
) -> tuple[list[str], float]:
    """Stop a run and resume it; return the errors found and the seconds until it ended."""
    wrong, draw = [], random.Random(seed)
    attempt = workload.start(forker, prepare=prepare)
    metrics = workload.run / "metrics.jsonl"
    attempt.wait(seconds=LONGEST_S, until=attempt.listens)
    if draw.random() < 0.8:  # else at any moment from here on
        attempt.wait(seconds=LONGEST_S, until=lambda: metrics.exists() and metrics.stat().st_size > 0)
    time.sleep(draw.uniform(0.0, 0.6))
    asked = range(workload.world_size) if draw.random() < 0.5 else [draw.randrange(workload.world_size)]
    is_over = len(attempt.poll()) > 0
    attempt.kill(asked, draw.choice(SIGNALS))
    began = time.monotonic()
    attempt.wait(seconds=30.0, until=lambda: any(attempt.codes.values()))
    attempt.kill(range(workload.world_size), signal.SIGTERM)  # as torchrun does when the first rank has ended
    attempt.wait(seconds=30.0)
    took_s = time.monotonic() - began
    codes = attempt.settle(seconds=1.0)
    if not is_over and set(codes) not in ({75}, {0}):  # 0: it was in its last step
        wrong.append(f"asked {list(asked)} to stop, ended with {codes}: {attempt.said()[-800:]}")
    wrong += damage(workload)
    steps = [record["step"] for record in read_jsonl(metrics)] if metrics.exists() else []
    wrong += workload.finish(forker, prepare=prepare)
    if set(codes) == {75} and resumed_at(workload) != max(steps, default=0):
        wrong.append(f"{max(steps, default=0)} steps were done, and it went on from {resumed_at(workload)}")
    return wrong + differences(workload, expected), took_s
