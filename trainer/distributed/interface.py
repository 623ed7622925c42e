"""Choose the network address that ranks meet and listen on. Imports no torch.

one machine         127.0.0.1 and its interface, so that nobody else can even connect
several machines    the address that MASTER_ADDR stands for, on the first one; never all addresses
"""

import ipaddress
import os
import socket
import struct
from collections.abc import Mapping

from trainer.errors import ConfigError

LOOPBACK = "127.0.0.1"
_GET_ADDRESS = 0x8915  # Linux: SIOCGIFADDR
_NAMED_BY = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
"""Environment variables by which a user names the interface between the machines."""


def interface_towards(host: str) -> str | None:
    """Return the name of the interface from which this machine reaches a host; None where the system does not tell.

    gloo binds to whatever the machine's own name stands for: on many clusters a loopback or management address.
    """
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # sends nothing: it only chooses a route
            address = probe.getsockname()[0]
    except OSError:
        return None
    return next((name for name, own in addresses().items() if own == address), None)


def addresses() -> dict[str, str]:
    """Return this machine's IPv4 addresses by interface; empty where the system does not tell."""
    found = {}
    try:
        import fcntl

        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            for _, name in socket.if_nameindex():
                request = struct.pack("256s", name.encode()[:15])
                try:
                    reply = fcntl.ioctl(probe.fileno(), _GET_ADDRESS, request)
                except OSError:  # an interface without an IPv4 address
                    continue
                found[name] = socket.inet_ntoa(reply[20:24])
    except (ImportError, OSError):
        return {}
    return found


def loopback_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Return what lets gloo and NCCL listen on this machine's loopback interface only; not what the user has set.

    For ranks that are all on this machine. gloo binds by default to what the machine's name stands for, and NCCL to an
    interface that other machines are behind.
    """
    name = interface_towards(LOOPBACK)
    return {} if name is None else {variable: name for variable in _NAMED_BY if variable not in environment}


def use_loopback() -> None:
    """Set these variables for the rest of this process."""
    os.environ.update(loopback_variables(os.environ))


def is_loopback(host: str) -> bool:
    """Tell whether a host is this machine by its very name: localhost, 127.0.0.1, ::1."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name, even if it stands for such an address here
        return False


def address_to_listen_on(master_addr: str, environment: Mapping[str, str]) -> str:
    """Return the address on which the first machine lets the others in: one, and not all that it has.

    It is the one that MASTER_ADDR stands for here. A name may stand for a loopback address on the machine itself
    (127.0.1.1 for its own name), or for an address that a router hands on: then it is that of the interface which the
    user has named, or of the only one there is.

    Args:
        master_addr: what the user says.
        environment: with GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME, where an interface was named.

    Raises:
        ConfigError: if several would do, or none.
    """
    own = [address for address in _resolved(master_addr) if _is_own(address)]
    if is_loopback(master_addr):  # all "machines" are this one
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
    stands_for = (
        f"stands for {own[0]}, which only this machine reaches" if is_inward else "is no address of this machine"
    )
    having = ", ".join(f"{name} {address}" for name, address in found.items()) or "no other address"
    raise ConfigError(
        f"MASTER_ADDR={master_addr}: {stands_for}; the first machine (NODE_RANK=0) has {having}; set MASTER_ADDR to "
        "the address that the other machines reach, or GLOO_SOCKET_IFNAME to its interface"
    )


def listening_socket(address: str, port: int) -> socket.socket:
    """Return a socket that listens on one address; port 0 takes a free one.

    Raises:
        OSError: if another process listens there, or this one may not.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # after the last attempt's connections
        listener.bind((address, port))
        listener.listen(4096)
    except OSError:
        listener.close()
        raise
    return listener


def _is_inward(address: str) -> bool:
    """Tell whether no other machine can reach an address, or it stands for all of them."""
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
