"""All trackers of a run together."""

from typing import Any

import pytest

from trainer.errors import PREEMPTED, CommError, NumericsError
from trainer.trackers.base import Trackers


class RecordingTracker:
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def log(self, record: Any, experts: Any = None) -> None:
        self.seen.append((record, experts))

    def written(self) -> list[tuple[str, str]]:
        return [("witness", str(len(self.seen)))]

    def close(self, exit_code: int, *, patience_s: float) -> None:
        self.seen.append((exit_code, patience_s))


def test_every_tracker_gets_every_record_and_the_end_once():
    one, two = RecordingTracker(), RecordingTracker()
    with Trackers([one]) as trackers:
        trackers.log({"step": 1})
        trackers.add([two])
        trackers.log({"step": 2}, {"counts": []})
        assert trackers.written() == [("witness", "2"), ("witness", "1")]
    with trackers:
        pass
    assert one.seen == [({"step": 1}, None), ({"step": 2}, {"counts": []}), (0, 10.0)]
    assert two.seen == one.seen[1:]


def test_trackers_get_the_exit_code_of_a_stopped_run():
    witness = RecordingTracker()
    with Trackers([witness]) as trackers:
        trackers.exit_code = PREEMPTED
    assert witness.seen == [(PREEMPTED, 10.0)]


@pytest.mark.parametrize(
    ("error", "end"),
    [
        (NumericsError("x"), (6, 10.0)),
        (ValueError("x"), (1, 10.0)),
        (CommError("x"), (5, 0.0)),
        (KeyboardInterrupt(), (130, 0.0)),
    ],
)
def test_trackers_get_the_exit_code_of_an_error_without_patience_if_ranks_are_lost(
    error: BaseException, end: tuple[int, float]
):
    witness = RecordingTracker()
    with pytest.raises(type(error)), Trackers([witness]):
        raise error
    assert witness.seen == [end]
