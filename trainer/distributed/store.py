"""Rendezvous store of the ranks: torch's TCPStore, listening on one address instead of all.

It has no password: whoever reaches it can read and write every key. On one host it listens on loopback only; over
several, the port must be closed to strangers (docs/reliability.md). Values read from it are never unpickled here.
"""

import os
from datetime import timedelta

import torch.distributed as dist

from trainer.distributed.interface import address_to_listen_on, listening_socket


def serve(address: str, port: int, *, clients: int | None, timeout_s: float) -> dist.TCPStore:
    """Start a store that listens on one address of this host; port 0 picks a free one.

    `clients` is the number of clients to wait for, including this process; None does not wait.

    Raises:
        OSError: if it cannot listen there.
    """
    listener = listening_socket(address, port)
    port, timeout, waits = listener.getsockname()[1], timedelta(seconds=timeout_s), clients is not None
    return dist.TCPStore(address, port, clients, True, timeout, waits, master_listen_fd=listener.detach())


def connect_store(address: str, port: int, *, rank: int, world_size: int, timeout_s: float) -> dist.Store:
    """Connect to the store of all ranks: torchrun's, or one that rank 0 starts under other launchers.

    Raises:
        OSError, RuntimeError: if the ranks cannot connect within `timeout_s`.
    """
    is_torchruns = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if rank == 0 and not is_torchruns:
        here = address_to_listen_on(address, os.environ)
        return serve(here, port, clients=world_size, timeout_s=timeout_s)
    return dist.TCPStore(address, port, world_size, False, timeout=timedelta(seconds=timeout_s))
