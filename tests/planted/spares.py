"""Faults of spare machines (`launch --spares`), by which ranks would be there twice, or not at all."""

from tests.planted.fault import Fault

_SEATS = "tests/unit/supervise/test_seats.py"
_TAKES = f"{_SEATS}::test_a_spare_waits_until_a_machine_is_lost_and_has_its_node_then"


def _fault(name: str, old: str, new: str, test: str) -> Fault:
    return Fault(name=f"spares: {name}", file="trainer/supervise/seats.py", old=old, new=new, tests=(test,))


FAULTS = [
    _fault(
        "a spare has the ranks of its own number",
        "node_rank=newest.machines.index(number)",
        "node_rank=number",
        _TAKES,
    ),
    _fault(
        "ranks meet at the address of the first machine that was lost",
        "address = seen[machines[0]].machine.address",
        "address = self._round.address or seen[machines[0]].machine.address",
        f"{_TAKES}[0]",
    ),
    _fault(
        "a spare takes the node of a machine that still ends its ranks",
        "if machine in lost and spares:",
        "if machine not in ready and spares:",
        f"{_SEATS}::test_nodes_stay_where_they_are_and_spares_take_those_of_lost_machines",
    ),
    _fault(
        "who was ready in an earlier run gets a node",
        "if one.has_changed and one.machine.is_ready_for(number)",
        "if one.machine.is_ready_for(number)",
        f"{_SEATS}::test_what_an_earlier_run_left_is_no_sign_of_life",
    ),
    _fault(
        "the second machine to decide the next start changes it",
        "os.link(made, self._path(round_.number))",
        "os.replace(made, self._path(round_.number))",
        f"{_SEATS}::test_of_two_machines_that_decide_the_next_start_the_first_has_decided",
    ),
]
