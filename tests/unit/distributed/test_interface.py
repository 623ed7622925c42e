import socket

from trainer.distributed.interface import interface_towards


def test_this_machine_is_behind_its_loopback() -> None:
    assert interface_towards("127.0.0.1") == "lo"


def test_a_host_that_is_nowhere_has_no_interface() -> None:
    assert interface_towards("no-such-host.invalid") is None


def test_the_name_is_one_of_the_machines_interfaces() -> None:
    assert interface_towards("192.0.2.1") in {name for _, name in socket.if_nameindex()} | {None}
