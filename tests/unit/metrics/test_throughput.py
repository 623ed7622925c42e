"""Throughput between two logged steps."""

import pytest

from trainer.metrics.throughput import ThroughputMeter
from trainer.step_timer import StepTimer


class Ticks:
    def __init__(self) -> None:
        self.time = 0.0

    def now(self) -> float:
        return self.time

    def seconds(self, begin: float, end: float) -> float:
        return end - begin


def test_the_parts_of_a_mean_step_add_up_to_its_time_without_pauses():
    clock = Ticks()
    watch = StepTimer(clock)
    pace = ThroughputMeter(watch, clock.now)
    for seconds in (1.0, 3.0):
        pace.begin()
        watch.enter("data")
        clock.time += seconds
        watch.enter("backward")
        clock.time += 1.0
        pace.end(num_tokens=30)
        clock.time += 50.0  # an evaluation
    speed = pace.take()
    assert (speed.step_s, speed.tokens_per_s) == (3.0, 10.0)
    assert {part: s for part, s in speed.parts.items() if s} == {"data": 2.0, "backward": 1.0}
    pace.begin()
    clock.time += 2.0
    pace.end(num_tokens=2)
    assert pace.take().parts["other"] == 2.0


def test_a_device_that_lags_behind_does_not_make_the_rest_negative():
    host, device = Ticks(), Ticks()
    watch = StepTimer(device)
    pace = ThroughputMeter(watch, host.now)
    pace.begin()
    watch.enter("optimizer")
    host.time += 1.0
    device.time += 1.5
    pace.end(num_tokens=1)
    parts = pace.take().parts
    assert parts["other"] == 0.0 and parts["optimizer"] == pytest.approx(1.5)
