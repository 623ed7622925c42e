"""Who keeps records, as one."""

from typing import Any

import pytest

from trainer.errors import PREEMPTED, CommError, NumericsError
from trainer.trackers.base import Trackers


class Witness:
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def log(self, record: Any, experts: Any = None) -> None:
        self.seen.append((record, experts))

    def written(self) -> list[tuple[str, str]]:
        return [("witness", str(len(self.seen)))]

    def close(self, exit_code: int, *, patience_s: float) -> None:
        self.seen.append((exit_code, patience_s))


def test_everybody_gets_every_record_and_the_end_once():
    one, two = Witness(), Witness()
    with Trackers([one]) as trackers:
        trackers.log({"step": 1})
        trackers.add([two])
        trackers.log({"step": 2}, {"counts": []})
        assert trackers.written() == [("witness", "2"), ("witness", "1")]
    with trackers:
        pass
    assert one.seen == [({"step": 1}, None), ({"step": 2}, {"counts": []}), (0, 10.0)]
    assert two.seen == one.seen[1:]


def test_a_run_that_was_stopped_ends_with_its_code():
    witness = Witness()
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
def test_an_error_ends_a_run_with_its_code_and_in_haste_where_that_matters(
    error: BaseException, end: tuple[int, float]
):
    witness = Witness()
    with pytest.raises(type(error)), Trackers([witness]):
        raise error
    assert witness.seen == [end]
