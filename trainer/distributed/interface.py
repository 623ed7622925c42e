"""Which network interface the other ranks are behind. No torch."""

import socket
import struct

_GET_ADDRESS = 0x8915  # Linux: SIOCGIFADDR


def interface_towards(host: str) -> str | None:
    """Return the name of the interface from which this machine reaches a host; None where the system does not tell.

    gloo binds to whatever the machine's own name stands for: on many clusters a loopback or management address.
    """
    try:
        import fcntl

        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # sends nothing: it only chooses a route
            address = probe.getsockname()[0]
            for _, name in socket.if_nameindex():
                request = struct.pack("256s", name.encode()[:15])
                try:
                    reply = fcntl.ioctl(probe.fileno(), _GET_ADDRESS, request)
                except OSError:  # an interface without an IPv4 address
                    continue
                if socket.inet_ntoa(reply[20:24]) == address:
                    return name
    except (ImportError, OSError):
        return None
    return None
