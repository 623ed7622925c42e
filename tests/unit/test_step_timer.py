"""The parts of a step do not overlap and add up to the step."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.step_timer import PARTS, StepPart, StepTimer


class Ticks:
    """A clock that tests advance; like a device's, it resolves timestamps only on request."""

    def __init__(self) -> None:
        self.time = 0
        self.asked = 0

    def now(self) -> int:
        return self.time

    def seconds(self, begin: int, end: int) -> float:
        self.asked += 1
        return float(end - begin)


def test_a_part_within_another_is_not_counted_in_that_as_well():
    clock = Ticks()
    watch = StepTimer(clock)
    watch.start()
    clock.time += 1
    watch.enter("data")
    clock.time += 2
    watch.enter("forward")
    clock.time += 3
    with watch.within("dispatch"):
        clock.time += 4
        with watch.within("communication"):
            clock.time += 5
        clock.time += 6
    clock.time += 7
    watch.enter("backward")
    clock.time += 8
    watch.stop()
    taken = {part: seconds for part, seconds in watch.take().items() if seconds}
    assert taken == {"other": 1, "data": 2, "forward": 10, "dispatch": 10, "communication": 5, "backward": 8}


_ACTIONS = st.one_of(
    st.integers(1, 9),
    st.tuples(st.sampled_from(["enter", "begin"]), st.sampled_from(PARTS)),
    st.just(("end", None)),
)


@given(st.lists(st.lists(_ACTIONS), max_size=5))
def test_the_parts_of_some_steps_make_up_their_time(steps: list[list[int | tuple[str, StepPart | None]]]):
    clock = Ticks()
    watch, total = StepTimer(clock), 0
    for actions in steps:
        clock.time += 100  # between steps: not counted
        watch.start()
        for action in actions:
            if isinstance(action, int):
                clock.time += action
                total += action
            else:
                name, part = action
                watch.end() if part is None else getattr(watch, name)(part)
        watch.stop()
    taken = watch.take()
    assert sum(taken.values()) == total and all(seconds >= 0 for seconds in taken.values())
    assert tuple(taken) == PARTS
    assert set(watch.take().values()) == {0.0}, "taken twice"


def test_outside_of_steps_nothing_is_measured():
    clock = Ticks()
    watch = StepTimer(clock)
    watch.enter("forward")
    with watch.within("experts"):
        clock.time += 5
    watch.start()
    watch.stop()
    clock.time += 5
    watch.enter("backward")
    assert set(watch.take().values()) == {0.0}


def test_marks_of_a_step_are_read_when_the_next_one_has_ended_and_a_device_is_through_with_them():
    clock = Ticks()
    watch = StepTimer(clock)
    watch.start()
    watch.stop()
    assert clock.asked == 0
    watch.start()
    watch.stop()
    assert clock.asked == 1
    watch.take()
    assert clock.asked == 2


def test_a_block_that_fails_ends_its_part():
    clock = Ticks()
    watch = StepTimer(clock)
    watch.start()
    with pytest.raises(ZeroDivisionError), watch.within("experts"):
        raise ZeroDivisionError
    clock.time += 3
    watch.stop()
    assert watch.take()["other"] == 3


def test_a_step_that_an_error_has_ended_is_forgotten():
    clock = Ticks()
    watch = StepTimer(clock)
    watch.start()
    watch.begin("communication")
    clock.time += 3
    watch.start()
    clock.time += 1
    watch.stop()
    assert {part: s for part, s in watch.take().items() if s} == {"other": 1}


def test_a_profiler_sees_the_parts_by_name_in_pairs():
    seen: list[str] = []

    @contextmanager
    def region(name: str) -> Iterator[None]:
        seen.append(name)
        yield
        seen.append(f"/{name}")

    watch = StepTimer()
    watch.region = region
    watch.start()
    watch.enter("forward")
    with watch.within("dispatch"):
        watch.begin("communication")
        watch.end()
    watch.enter("backward")
    watch.begin("communication")
    watch.region = None
    watch.stop()
    assert " ".join(seen) == (
        "other /other forward dispatch communication /communication /dispatch /forward "
        "backward communication /communication /backward"
    )
