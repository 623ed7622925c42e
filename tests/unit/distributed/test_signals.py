import signal
from collections.abc import Iterator

import pytest

from trainer.distributed import signals
from trainer.distributed.signals import StopRequest
from trainer.errors import StopRequested

NUMBERS = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP]


@pytest.fixture
def heard() -> Iterator[list[int]]:
    """Signals that reached the previous handler."""
    numbers: list[int] = []
    before = [(n, signal.signal(n, lambda number, frame: numbers.append(number))) for n in NUMBERS]
    yield numbers
    for number, handler in before:
        signal.signal(number, handler)


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_before_the_first_step_ends_the_run_there(heard: list[int], number: signal.Signals) -> None:
    with (
        pytest.raises(StopRequested, match=f"stopped by {number.name} before its first step: nothing is lost"),
        StopRequest(),
    ):
        signal.raise_signal(number)
    assert heard == []


def test_a_signal_that_was_swallowed_ends_the_run_at_its_first_step(heard: list[int]) -> None:
    with pytest.raises(StopRequested), StopRequest() as stop:
        try:
            signal.raise_signal(signal.SIGTERM)
        except BaseException:
            assert stop
        stop.begin_steps()
    assert heard == []


@pytest.mark.parametrize("number", NUMBERS)
def test_the_same_request_by_two_senders_is_one(heard: list[int], number: signal.Signals) -> None:
    with StopRequest() as stop:
        stop.begin_steps()
        assert not stop
        signal.raise_signal(number)
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested_by == number.name
    assert heard == []


def test_a_later_signal_is_handled_as_if_nobody_listened(heard: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "SAME_REQUEST_S", -1.0)
    with StopRequest() as stop:
        stop.begin_steps()
        signal.raise_signal(signal.SIGTERM)
        assert heard == []
        signal.raise_signal(signal.SIGTERM)
        assert heard == [signal.SIGTERM]


def test_a_run_that_has_obeyed_hears_no_more(heard: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "SAME_REQUEST_S", -1.0)
    with StopRequest() as stop:
        stop.begin_steps()
        signal.raise_signal(signal.SIGTERM)
        stop.obey()
        signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)
    assert heard == []


@pytest.mark.parametrize("number", NUMBERS)
def test_what_was_ignored_stays_ignored(heard: list[int], number: signal.Signals) -> None:
    signal.signal(number, signal.SIG_IGN)
    with StopRequest() as stop:
        signal.raise_signal(number)
        assert not stop
        assert signal.getsignal(number) is signal.SIG_IGN
    assert signal.getsignal(number) is signal.SIG_IGN
