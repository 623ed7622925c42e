import pytest

from trainer.status import Phase, Status
from trainer.supervise.exit_status import ExitStatus, diagnose_exit


def running(rank: int, step: int, phase: Phase = "training") -> Status:
    rows = [8 * step - 8, 8 * step - 1] if step else None
    return Status(attempt="a", rank=rank, host="h", pid=100 + rank, step=step, rows=rows, phase=phase, updated=1.0)


def ended(rank: int, step: int, code: int, error: str | None = None, *, updated: float = 2.0) -> Status:
    status = running(rank, step)
    status.state, status.exit_code, status.error, status.updated = "ended", code, error, updated
    return status


def torchrun(code: int, report: dict, *statuses: Status) -> ExitStatus:
    written = {status.rank: status for status in statuses}
    return diagnose_exit(code, pid=99, report=report, statuses=written, ranks=range(2), is_alone=False)


def alone(code: int, status: Status) -> ExitStatus:
    return diagnose_exit(code, pid=100, report={}, statuses={0: status}, ranks=[0], is_alone=True)


def failed(codes: dict[int, int]) -> dict:
    return {"failures": [{"rank": rank, "pid": 100 + rank, "code": code} for rank, code in codes.items()]}


def failure(rank: int, code: int) -> dict:
    return failed({rank: code})


def test_a_killed_rank_is_named_with_the_survivors_step_and_code() -> None:
    ending = torchrun(1, failure(1, -9), ended(0, 33, 5, "rank 1 is lost"), running(1, 30))
    assert (ending.code, ending.exit_code) == (-9, 5)
    assert f"{ending.what} {ending.where}" == "rank 1 (pid 101) was killed by SIGKILL at step 33"
    assert ending.rows == [256, 263]


def test_an_only_rank_that_is_killed_was_about_where_it_said_last() -> None:
    ending = alone(-9, running(0, 30, "saving"))
    assert (ending.code, ending.exit_code) == (-9, 137)
    assert f"{ending.what} {ending.where}" == "rank 0 (pid 100) was killed by SIGKILL at about step 30 (saving)"


def test_of_several_errors_the_first_is_the_cause() -> None:
    ending = torchrun(1, failure(0, 3), ended(0, 2, 3, "rank 1: no", updated=5.0), ended(1, 2, 3, "no", updated=4.0))
    assert (ending.code, ending.what) == (3, "rank 1 (pid 101) ended with 3 (no)")


def test_ranks_that_torchrun_stopped_because_one_failed_were_not_asked_to_stop() -> None:
    ending = torchrun(1, failure(1, 1), ended(0, 0, 75, "stopped by SIGTERM"))
    assert (ending.code, ending.what, ending.where) == (1, "rank 1 (pid 101) ended with 1", "in start-up")


def test_torchrun_s_own_code_hides_nothing() -> None:
    for code in (2, 5, 7, 75):
        assert torchrun(1, failure(0, code)).exit_code == code
        assert torchrun(1, {"signal": "SIGTERM"}, ended(0, 9, code), ended(1, 9, code)).exit_code == code
    assert torchrun(1, {"signal": "SIGTERM"}).code == 75, "before any rank had begun"
    assert torchrun(0, {}, ended(0, 9, 0), ended(1, 9, 0)).code == 0


def test_torchrun_that_is_killed_or_fails_itself_is_named() -> None:
    ending = torchrun(-9, {}, running(0, 4), running(1, 5))
    assert f"{ending.what} {ending.where}" == "torchrun (pid 99) was killed by SIGKILL at about step 5"
    assert torchrun(1, {}).what == "torchrun (pid 99) ended with 1"
    assert torchrun(5, {"error": "no"}).what == "torchrun (pid 99) ended with 5 (no)"


def test_a_rank_that_is_killed_on_its_way_out_had_ended() -> None:
    assert alone(-15, ended(0, 9, 75)).code == 75


@pytest.mark.parametrize("code", [2, 3, 4, 6])
@pytest.mark.parametrize("other", [-15, -9, -6, 1, 5, 7, 75])
def test_an_error_that_stays_is_the_end_whatever_became_of_the_other_rank(code: int, other: int) -> None:
    for ending in (
        torchrun(1, failed({0: code, 1: other})),
        torchrun(1, failed({0: other, 1: code}), ended(1, 9, code)),
        torchrun(1, failure(0, other), ended(1, 9, code)),
    ):
        assert (ending.code, ending.exit_code) == (code, code)


def test_of_failures_that_may_pass_a_signal_comes_first_and_torchrun_s_own_last() -> None:
    for codes, code in (((7, -11), -11), ((-15, 7), 7), ((75, 1), 1), ((-15, 75), 75), ((-15, -9), -9)):
        ending = torchrun(1, failed(dict(enumerate(codes))))
        assert ending.code == code, codes
        assert ending.what.startswith(f"rank {codes.index(code)} "), codes


def test_a_run_that_was_done_when_it_was_asked_to_stop_is_done() -> None:
    done = [ended(0, 9, 0), ended(1, 9, 0)]
    for code, report in ((1, {"signal": "SIGTERM"}), (-9, {}), (1, failure(1, -15))):
        assert (torchrun(code, report, *done).code, torchrun(code, report, *done).exit_code) == (0, 0)
    assert alone(-15, ended(0, 9, 0)).exit_code == 0
    assert torchrun(1, {"signal": "SIGTERM"}, ended(0, 9, 0), running(1, 9)).code == 1, "one was not"
    assert torchrun(1, {"signal": "SIGTERM"}, ended(0, 9, 0), ended(2, 9, 0)).code == 1, "of another machine"


def test_a_save_that_had_to_be_and_was_refused_is_told_from_memory_that_ran_out() -> None:
    full = ended(0, 30, 7, "step 30 not saved")
    full.phase = "saving"
    assert alone(7, full).is_unsaved
    assert not alone(7, ended(0, 30, 7, "out of memory")).is_unsaved
    assert not alone(-9, running(0, 30, "saving")).is_unsaved


def test_who_gave_no_sign_of_life_is_named_and_that_may_pass() -> None:
    kept = {"pid": 100, "report": {}, "silence_s": 60.0}
    ending = diagnose_exit(-9, statuses={0: running(0, 7)}, ranks=[0], is_alone=True, silent=["0"], **kept)
    assert (ending.code, ending.exit_code) == (-9, 5)
    assert f"{ending.what} {ending.where}" == (
        "rank 0 (pid 100) sent no liveness message for 60 s (frozen or stuck), killed at about step 7"
    )
    both = {0: running(0, 7), 1: running(1, 7)}
    for silent, who in ((["1", "0"], "ranks 0 and 1"), (["0", "torchrun"], "torchrun (pid 100)")):
        ending = diagnose_exit(-9, statuses=both, ranks=range(2), is_alone=False, silent=silent, **kept)
        assert ending.what == f"{who} sent no liveness message for 60 s (frozen or stuck), killed"
    wrong = {0: ended(0, 7, 3, "no"), 1: running(1, 7)}
    ending = diagnose_exit(-9, statuses=wrong, ranks=range(2), is_alone=False, silent=["1"], **kept)
    assert (ending.code, ending.what) == (3, "rank 0 (pid 100) ended with 3 (no)"), "what stays wrong comes first"
