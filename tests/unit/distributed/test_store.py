"""The store's listening address, and that torchrun executes nothing from it."""

import base64
import os
import pickle
import socket
import threading
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.listening_sockets import listeners
from tests.unit.distributed.test_wire_format import Evil
from trainer.distributed import interface
from trainer.distributed.interface import LOOPBACK, address_to_listen_on, loopback_variables
from trainer.distributed.store import serve
from trainer.distributed.torchrun import Rendezvous
from trainer.errors import ConfigError


def test_the_store_listens_on_one_address() -> None:
    before = listeners([os.getpid()])
    store = serve(LOOPBACK, 0, clients=None, timeout_s=10)
    assert listeners([os.getpid()]) - before == {(LOOPBACK, store.port)}
    client = dist.TCPStore(LOOPBACK, store.port, None, False, wait_for_workers=False)
    client.set("a", "b")
    assert store.get("a") == b"b"


def test_a_port_that_is_taken_is_an_error() -> None:
    with socket.create_server((LOOPBACK, 0)) as other, pytest.raises(OSError, match="in use"):
        serve(LOOPBACK, other.getsockname()[1], clients=None, timeout_s=10)


def test_torchruns_part_of_the_store_is_on_one_address_and_what_a_stranger_writes_there_is_not_executed(
    tmp_path: Path,
) -> None:
    before = listeners([os.getpid()])
    late = threading.Timer(1000, print)
    machine = Rendezvous(LOOPBACK, 0, 0, 1, "run", 10, late=late)
    place = machine.next_rendezvous().bootstrap_store_info
    assert place is not None
    assert listeners([os.getpid()]) - before == {(LOOPBACK, place.master_port)} and place.master_addr == LOOPBACK
    stranger = dist.TCPStore(LOOPBACK, place.master_port, None, False, timedelta(seconds=10), wait_for_workers=False)
    # Encoded as torchrun writes its own values.
    evil = base64.b64encode(pickle.dumps(Evil(str(tmp_path / "executed")))).decode()
    for key in [*stranger.list_keys(), "run", "torch.rendezvous.run", "run/torchelastic/role_info/0"]:
        stranger.set(key, evil)
    assert (machine.num_nodes_waiting(), machine.is_closed(), machine.shutdown()) == (0, False, True)
    machine.next_rendezvous()
    assert not (tmp_path / "executed").exists()
    assert late.finished.is_set(), "the ranks run, so torchrun no longer waits for the store"


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Interfaces and resolved names of a host."""
    found = {"lo": "127.0.0.1", "eth0": "10.0.0.1"}
    names = {"node1": ["127.0.1.1"], "service": ["10.96.0.7"], "big": ["10.0.0.1"], "localhost": ["::1", "127.0.0.1"]}
    monkeypatch.setattr(interface, "addresses", lambda: found)
    monkeypatch.setattr(interface, "_resolved", lambda host: names.get(host, [host]))
    monkeypatch.setattr(interface, "_is_own", lambda address: address in found.values() or address.startswith("127."))
    return found


def test_the_first_machine_listens_where_master_addr_is(network: dict[str, str]) -> None:
    network["ib0"] = "10.1.0.1"
    assert address_to_listen_on("10.1.0.1", {}) == "10.1.0.1"
    assert address_to_listen_on("big", {"GLOO_SOCKET_IFNAME": "ib0"}) == "10.0.0.1", "others connect there"
    assert address_to_listen_on("localhost", {}) == address_to_listen_on("127.0.0.1", {}) == "127.0.0.1"


@pytest.mark.parametrize("name", ["node1", "service"])
def test_a_name_that_others_know_otherwise_means_the_interface_that_is_named_or_the_only_one(
    network: dict[str, str], name: str
) -> None:
    assert address_to_listen_on(name, {}) == "10.0.0.1"
    network["ib0"] = "10.1.0.1"
    assert address_to_listen_on(name, {"GLOO_SOCKET_IFNAME": "ib0"}) == "10.1.0.1"
    assert address_to_listen_on(name, {"NCCL_SOCKET_IFNAME": "eth0"}) == "10.0.0.1"
    for named in ({}, {"NCCL_SOCKET_IFNAME": "^docker0"}, {"GLOO_SOCKET_IFNAME": "lo"}):
        with pytest.raises(ConfigError) as error:
            address_to_listen_on(name, named)
        assert str(error.value).startswith(f"MASTER_ADDR={name}: ")
        assert str(error.value).endswith(
            "the first node (NODE_RANK=0) has eth0 10.0.0.1, ib0 10.1.0.1; set MASTER_ADDR to the address that the "
            "other nodes reach, or GLOO_SOCKET_IFNAME to its interface"
        )


def test_all_addresses_are_none(network: dict[str, str]) -> None:
    network["ib0"] = "10.1.0.1"
    with pytest.raises(ConfigError, match=r"MASTER_ADDR=0\.0\.0\.0: is not an address of this host"):
        address_to_listen_on("0.0.0.0", {})


def test_ranks_of_one_machine_stay_on_its_loopback_unless_the_user_says_otherwise() -> None:
    assert loopback_variables({}) == {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    assert loopback_variables({"GLOO_SOCKET_IFNAME": "eth0"}) == {"NCCL_SOCKET_IFNAME": "lo"}
