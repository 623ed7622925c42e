import signal
from collections.abc import Iterator

import pytest

from trainer.distributed import signals
from trainer.distributed.signals import StopRequest


@pytest.fixture
def heard() -> Iterator[list[int]]:
    """Signals that reached whoever listened before."""
    numbers: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: numbers.append(number))
    yield numbers
    signal.signal(signal.SIGTERM, before)


def test_the_same_request_by_two_senders_is_one(heard: list[int]) -> None:
    with StopRequest() as stop:
        assert not stop
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested_by == "SIGTERM"
    assert heard == []


def test_a_later_signal_is_handled_as_if_nobody_listened(heard: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "_SAME_REQUEST_S", -1.0)
    with StopRequest():
        signal.raise_signal(signal.SIGTERM)
        assert heard == []
        signal.raise_signal(signal.SIGTERM)
        assert heard == [signal.SIGTERM]
