"""Find the listening TCP sockets of processes in /proc."""

import socket
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

_LISTEN = "0A"


def listeners(pids: Iterable[int]) -> set[tuple[str, int]]:
    """Return address and port of every TCP socket on which one of the processes listens."""
    found = set()
    for pid in pids:
        own = set()
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            try:
                own.add(str(descriptor.readlink()))
            except FileNotFoundError:  # closed meanwhile
                continue
        found |= {place for place, number in _table(pid) if f"socket:[{number}]" in own}
    return found


def of_host() -> set[tuple[str, int]]:
    """Return the sockets of all processes of this network namespace."""
    return {place for place, _ in _table("self")}


def beyond_this_machine(pids: Iterable[int]) -> set[tuple[str, int]]:
    """Return the sockets that another machine could reach."""
    return {(address, port) for address, port in listeners(pids) if not address.startswith("127.") and address != "::1"}


def _table(pid: int | str) -> Iterator[tuple[tuple[str, int], str]]:
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == _LISTEN:
                yield _parsed(fields[1]), fields[9]


def _parsed(text: str) -> tuple[str, int]:
    number, port = text.split(":")
    words = struct.pack(f"={len(number) // 8}I", *(int(number[i : i + 8], 16) for i in range(0, len(number), 8)))
    return socket.inet_ntop(socket.AF_INET if len(words) == 4 else socket.AF_INET6, words), int(port, 16)
