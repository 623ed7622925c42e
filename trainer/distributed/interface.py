"""Choose the network address and interface that ranks listen on. Imports no torch.

one node         127.0.0.1 and its interface, so that no other host can even connect
several nodes    the address that MASTER_ADDR resolves to on the first node; never all addresses
"""

import fcntl
import ipaddress
import os
import socket
import struct
from collections.abc import Mapping
from contextlib import suppress

from trainer.errors import ConfigError

LOOPBACK = "127.0.0.1"
_GET_ADDRESS = 0x8915  # Linux: SIOCGIFADDR
_NAMED_BY = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
"""Environment variables by which a user names the interface between the nodes."""


def interface_towards(host: str) -> str | None:
    """Return the name of the interface with the route to a host; None if unknown.

    By default gloo binds to the address of the host name, on many clusters a loopback or management address.
    """
    address = _own_address_towards(host)
    return next((name for name, own in addresses().items() if own == address), None)


def address_towards(host: str, environment: Mapping[str, str]) -> str:
    """Return this host's address on the interface that a user has named, else on the route to a host; maybe empty."""
    found = addresses()
    named = next((found[environment[key]] for key in _NAMED_BY if environment.get(key, "") in found), None)
    return named or _own_address_towards(host) or ""


def _own_address_towards(host: str) -> str | None:
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # UDP: selects a route and sends nothing
            return probe.getsockname()[0]
    except OSError:
        return None


def addresses() -> dict[str, str]:
    """Return this host's IPv4 addresses by interface; empty if unknown."""
    found = {}
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # an interface without an IPv4 address
                reply = fcntl.ioctl(probe.fileno(), _GET_ADDRESS, struct.pack("256s", name.encode()[:15]))
                found[name] = socket.inet_ntoa(reply[20:24])
    return found


def loopback_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Return variables that restrict gloo and NCCL to the loopback interface, without those already set.

    For ranks that are all on this node. By default gloo binds to the address of the host name, and NCCL to an interface
    that other hosts can reach.
    """
    name = interface_towards(LOOPBACK)
    return {} if name is None else {variable: name for variable in _NAMED_BY if variable not in environment}


def use_loopback() -> None:
    """Restrict gloo and NCCL to the loopback interface in this process."""
    os.environ.update(loopback_variables(os.environ))


def is_loopback(host: str) -> bool:
    """Return whether a host is literally loopback: localhost, 127.0.0.1 or ::1. Does not resolve names."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name, even if it resolves to such an address
        return False


def address_to_listen_on(master_addr: str, environment: Mapping[str, str]) -> str:
    """Return the single address on which the first node listens: the one that MASTER_ADDR resolves to.

    MASTER_ADDR may also resolve to a loopback address (127.0.1.1 for the host's own name) or to one that a router
    translates. Then it is the address of the interface that the user has named by GLOO_SOCKET_IFNAME or
    NCCL_SOCKET_IFNAME, or of the only one.

    Raises:
        ConfigError: if the address is ambiguous, or there is none.
    """
    own = [address for address in _resolved(master_addr) if _is_own(address)]
    if is_loopback(master_addr):  # all nodes are this host
        return own[0] if own else LOOPBACK
    outward = [address for address in own if not _is_inward(address)]
    if outward:
        return outward[0]
    found = {name: address for name, address in addresses().items() if not _is_inward(address)}
    named = next((found[environment[key]] for key in _NAMED_BY if environment.get(key, "") in found), None)
    if named is not None:
        return named
    if len(found) == 1:
        return next(iter(found.values()))
    is_inward = bool(own) and ipaddress.ip_address(own[0]).is_loopback
    problem = f"resolves to {own[0]}, which only this host reaches" if is_inward else "is not an address of this host"
    having = ", ".join(f"{name} {address}" for name, address in found.items()) or "no other address"
    raise ConfigError(
        f"MASTER_ADDR={master_addr}: {problem}; the first node (NODE_RANK=0) has {having}; set MASTER_ADDR to "
        "the address that the other nodes reach, or GLOO_SOCKET_IFNAME to its interface"
    )


def listening_socket(address: str, port: int) -> socket.socket:
    """Return a socket that listens on one address, or raise an OSError; port 0 picks a free one."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of the last attempt may linger
        listener.bind((address, port))
        listener.listen(4096)
    except OSError:
        listener.close()
        raise
    return listener


def _is_inward(address: str) -> bool:
    """Return whether an address is loopback, or the wildcard for all addresses."""
    parsed = ipaddress.ip_address(address)
    return parsed.is_loopback or parsed.is_unspecified


def _is_own(address: str) -> bool:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((address, 0))
    except OSError:
        return False
    return True


def _resolved(host: str) -> list[str]:
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return []
    return list(dict.fromkeys(str(address[0]) for *_, address in found))
