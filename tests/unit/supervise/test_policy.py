from collections.abc import Sequence

import pytest

from trainer.supervise.policy import AttemptOutcome, Policy, Restart, decide, is_retried


def decided(*outcomes: tuple[int, int | None], before: int | None = None) -> Restart | None:
    history: Sequence[AttemptOutcome] = [AttemptOutcome(code=code, checkpoint=step) for code, step in outcomes]
    return decide(history, before=before, policy=Policy())


@pytest.mark.parametrize("code", [0, 2, 3, 4, 6, 75, 130])
def test_what_would_end_the_same_way_is_not_retried(code: int) -> None:
    assert not is_retried(code)
    assert decided((code, None)) is None


@pytest.mark.parametrize("code", [1, 5, 7, -9, -11, -15])
def test_what_may_pass_is_retried(code: int) -> None:
    assert decided((code, None)) == Restart(pause_s=1, number=1, num_left=2)


def test_three_restarts_without_progress_are_the_last() -> None:
    failures = [(1, 30)] * 4
    restarts = [decided(*failures[:n], before=30) for n in (1, 2, 3)]
    assert [(r.pause_s, r.number, r.num_left) for r in restarts if r] == [(1, 1, 2), (2, 2, 1), (4, 3, 0)]
    assert decided(*failures, before=30) is None


def test_a_newer_checkpoint_starts_the_count_again() -> None:
    assert decided((1, None), (1, None), (1, 10), before=None) == Restart(pause_s=1, number=1, num_left=2)
    assert decided((1, 20), (1, 20), (-9, 20), (5, 20), before=10) is None
    assert decided((1, 20), (1, 10), (1, 10), (1, 10), before=20) is None, "an older one is no progress"
    assert decided(*[(1, step) for step in range(100)], before=None) == Restart(pause_s=1, number=1, num_left=2)


def test_pauses_have_an_end() -> None:
    history = [AttemptOutcome(code=1, checkpoint=None)] * 9
    restart = decide(history, before=None, policy=Policy(max_restarts=10))
    assert restart == Restart(pause_s=60, number=9, num_left=1)
