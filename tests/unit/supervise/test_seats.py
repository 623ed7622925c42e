import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from trainer.errors import ConfigError
from trainer.supervise import seats as seats_module
from trainer.supervise.launch import Launch
from trainer.supervise.machines import Machine, Machines
from trainer.supervise.seats import Round, RunIsOver, Seats, assign_nodes
from trainer.supervise.stop_signals import StopSignals


def test_nodes_stay_where_they_are_and_spares_take_those_of_lost_machines() -> None:
    assert assign_nodes([0, 1], ready={0, 1, 2}, lost=set()) == [0, 1]
    assert assign_nodes([0, 1], ready={0, 2}, lost={1}) == [0, 2]
    assert assign_nodes([0, 2], ready={1, 2}, lost={0}) == [1, 2], "one that came back is a spare"
    assert assign_nodes([0, 1, 2], ready={1, 3, 4}, lost={0, 2}) == [3, 1, 4]
    assert assign_nodes([0, 1], ready={0, 2}, lost=set()) is None, "machine 1 still ends its ranks"
    assert assign_nodes([0, 1], ready={0}, lost={1}) is None, "nobody is there instead"
    assert assign_nodes([0, 1, 2], ready={0, 3}, lost={1, 2}) is None


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let signs of life be sent often, and machines be lost soon: after fifty signs, as a busy machine delays some."""
    monkeypatch.setattr("trainer.supervise.machines.BEAT_S", 0.02)
    for name, seconds in (("_POLL_S", 0.02), ("_START_S", 1.0), ("_TWIN_S", 1.0), ("_MEET_S", 3.0)):
        monkeypatch.setattr(seats_module, name, seconds)
    monkeypatch.setattr(seats_module, "_import_torch", lambda: None)


def seats_of(folder: Path, machine: int, *, nnodes: int = 2, spares: int = 1) -> Seats:
    launch = Launch(nnodes=nnodes, spares=spares, node_rank=machine, master_addr="127.0.0.1")
    return Seats(folder, launch, lost_s=1.0)


def wait_until(is_so: Callable[[], bool]) -> None:
    """Wait for what a thread of another machine says."""
    end = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.01)


def is_seen(seats: Seats, machine: int, state: str) -> bool:
    """Return whether a machine has seen another one say something."""
    seen = seats._machines.seen()
    return machine in seen and seen[machine].has_changed and seen[machine].machine.state == state


def machine_there(folder: Path, number: int, round_: int) -> Machines:
    """Return another machine of the run, ready for a round."""
    other = Machines(folder, number=number, address="127.0.0.1", round_=round_)
    other.open()
    return other


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("lost", [0, 1])
def test_a_spare_waits_until_a_machine_is_lost_and_has_its_node_then(tmp_path: Path, lost: int) -> None:
    there = [Machines(tmp_path, number=number, address=f"127.0.0.{5 + number}", round_=1) for number in range(2)]
    for machine in there:
        machine.open()
    spare, began = seats_of(tmp_path, 2), time.monotonic()
    spare.open()
    with StopSignals() as requests:
        (tmp_path / "round-00000001").write_text(json.dumps({"machines": [0, 1], "address": "127.0.0.5"}))
        for machine in there:
            machine.say("running", round_=1)
        wait_until(lambda: is_seen(spare, 0, "running") and is_seen(spare, 1, "running"))
        left = there[1 - lost]
        there[lost].close()
        left.say("ready", round_=2)
        seat = spare.take(requests)
    assert seat is not None and (seat.node_rank, list(seat.ranks)) == (lost, [lost])
    assert seat.master_addr == ("127.0.0.5" if lost else "127.0.0.1"), "that of the machine with the first node now"
    assert time.monotonic() - began > 1.0, "it was given its time"
    assert json.loads((tmp_path / "round-00000002").read_text())["machines"] == ([0, 2] if lost else [2, 1])
    left.say("ended", round_=2, code=6)
    with StopSignals() as requests, pytest.raises(RunIsOver, match=rf"machine {1 - lost} .* has ended with 6") as over:
        spare.take(requests)
    assert over.value.code == 6
    left.close()
    spare.leave(6)


def test_of_two_machines_that_decide_the_next_start_the_first_has_decided(tmp_path: Path) -> None:
    first, second = seats_of(tmp_path, 0), seats_of(tmp_path, 2)
    first._make(Round(number=1, machines=[0, 1], address="a"))
    second._make(Round(number=1, machines=[2, 1], address="b"))
    found = second._newest()
    assert (found.number, list(found.machines), found.address) == (1, [0, 1], "a")


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("num_ended", [1, 2])
def test_what_an_earlier_run_left_is_no_sign_of_life(tmp_path: Path, num_ended: int) -> None:
    """One of its machines ended, or both, and its files say that the others are ready."""
    left = [machine_there(tmp_path, number, 4) for number in range(3)]
    for machine in left[:num_ended]:
        machine.say("ended", round_=3, code=75)
    for machine in left:
        machine.close()
    (tmp_path / "round-00000003").write_text(json.dumps({"machines": [0, 1], "address": "127.0.0.1"}))
    first = seats_of(tmp_path, 0)
    first.open()
    with (
        StopSignals() as requests,
        pytest.raises(seats_module.CommError, match=r"^machine 1 is not ready after 3 s"),
    ):
        first.take(requests)
    first.leave(5)


@pytest.mark.usefixtures("quick")
def test_a_number_that_is_taken_is_a_config_error(tmp_path: Path) -> None:
    zero = machine_there(tmp_path, 0, 1)
    with pytest.raises(ConfigError, match=r"^NODE_RANK=0: .* process \d+ is this run's machine of that number"):
        seats_of(tmp_path, 0).open()
    zero.close()
    seats_of(tmp_path, 0).open()


@pytest.mark.usefixtures("quick")
def test_ranks_that_wait_for_a_machine_that_has_left_are_told_so(tmp_path: Path) -> None:
    one = machine_there(tmp_path, 1, 1)
    first = seats_of(tmp_path, 0)
    first.open()
    with StopSignals() as requests:
        assert first.take(requests) is not None
    one.say("running", round_=1)
    wait_until(lambda: is_seen(first, 1, "running"))
    assert first.lost_since() is None
    one.say("ready", round_=2)
    wait_until(lambda: first.lost_since() is not None)
    assert first.lost_since() == "machine 1 has failed"
    one.close()
    wait_until(lambda: first.lost_since() == "machine 1 is lost")
    first.leave(0)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b'{"number": 1}', b"[" * 9999])
def test_a_damaged_file_is_none(content: bytes) -> None:
    assert Machine.of_json(content) is None


def test_a_foreign_address_is_refused() -> None:
    own = Machine(number=0, start="a", address="10.0.0.1", host="h", round=1, state="ready")
    values = {name: getattr(own, name) for name in Machine.__slots__}
    assert Machine.of_json(json.dumps(values)) == own
    for change in ({"address": "a b"}, {"address": "-x;y"}, {"round": True}, {"state": "lost"}, {"number": "1"}):
        assert Machine.of_json(json.dumps(values | change)) is None


@pytest.mark.parametrize(
    "content", ["", "{}", '{"machines": [0], "address": ""}', '{"machines": [0, 7], "address": ""}']
)
def test_a_round_of_another_size_is_not_gone_on_from(tmp_path: Path, content: str) -> None:
    (tmp_path / "round-00000007").write_text(content)
    assert (seats_of(tmp_path, 0)._round.number, list(seats_of(tmp_path, 0)._round.machines)) == (7, [0, 1])
