"""Tests for the spike window."""

import json
import statistics

import pytest

from trainer.training.spikes import SpikeWindow


def _filled(count: int, **fields: int) -> SpikeWindow:
    window = SpikeWindow(sigmas=6.0, **{"size": 128, "patience": 3, **fields})
    for i in range(count):
        window.note_taken(2.0 + 0.1 * (i % 5))
    return window


def test_a_spike_exceeds_sigmas_standard_deviations() -> None:
    window = _filled(40)
    limit = window.limit()
    assert limit == pytest.approx(statistics.fmean(window.losses) + 6 * statistics.pstdev(window.losses), rel=1e-12)


def test_fewer_than_32_losses_detect_no_spike() -> None:
    assert _filled(31).limit() is None
    assert _filled(32).limit() is not None


def test_constant_losses_detect_no_spike() -> None:
    window = SpikeWindow(sigmas=6.0, size=64, patience=3)
    for _ in range(64):
        window.note_taken(0.1)
    assert window.limit() is None


def test_only_the_last_losses_count() -> None:
    window = _filled(100, size=40)
    assert len(window.losses) == 40
    for _ in range(40):
        window.note_taken(9.0)
    window.note_taken(9.5)
    limit = window.limit()
    assert limit is not None and limit > 9.0


def test_the_window_restarts_after_too_many_skipped_spikes_in_a_row() -> None:
    window = _filled(40)
    assert [window.note_skipped(), window.note_skipped(), window.note_skipped()] == [False, False, True]
    assert window.limit() is None and not window.losses
    assert window.skipped_in_a_row == 3
    window.note_taken(50.0)
    assert window.skipped_in_a_row == 0


def test_a_step_taken_between_skipped_spikes_resets_their_count() -> None:
    window = _filled(40)
    assert not window.note_skipped() and not window.note_skipped()
    window.note_taken(2.0)
    assert not window.note_skipped() and not window.note_skipped() and window.note_skipped()


def test_a_window_survives_json_to_the_last_bit() -> None:
    window = _filled(50)
    window.note_taken(1 / 3)
    window.count = 7
    assert not window.note_skipped()
    other = _filled(3)
    other.restore(json.loads(json.dumps(window.record())))
    assert other.record() == window.record() and other.limit() == window.limit()
    assert [x.hex() for x in other.losses] == [x.hex() for x in window.losses]


def test_a_smaller_window_restores_the_newest_losses() -> None:
    window = _filled(0, size=32)
    window.restore(_filled(100).record())
    assert list(window.losses) == list(_filled(100).losses)[-32:]


def test_no_sigmas_no_spikes() -> None:
    window = SpikeWindow(sigmas=None, size=64, patience=3)
    for i in range(64):
        window.note_taken(float(i))
    assert window.limit() is None and not window.losses
