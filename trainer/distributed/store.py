"""The store in which ranks meet: torch's TCPStore on one address, where torch's own listens on all of them.

It has no password, and who reaches it can read and write every key: on one machine nobody else does, over several the
port must be closed to strangers (docs/reliability.md). Nothing that is read from it here is unpickled.
"""

import os
from datetime import timedelta

import torch.distributed as dist

from trainer.distributed.interface import address_to_listen_on, listening_socket


def serve(address: str, port: int, *, clients: int | None, timeout_s: float) -> dist.TCPStore:
    """Start a store that listens on one address; port 0 takes a free one.

    Args:
        address: of this machine.
        port: there.
        clients: how many connect, this process included, for which it waits; None waits for nobody.
        timeout_s: how long whoever asks it waits for an answer.

    Raises:
        OSError: if it cannot listen there.
    """
    listener = listening_socket(address, port)
    return dist.TCPStore(
        address,
        listener.getsockname()[1],
        clients,
        True,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=clients is not None,
        master_listen_fd=listener.detach(),
    )


def connect_store(address: str, port: int, *, rank: int, world_size: int, timeout_s: float) -> dist.Store:
    """Connect to the store of all ranks: torchrun's, or under another launcher the one that rank 0 starts here.

    Args:
        address: MASTER_ADDR.
        port: MASTER_PORT.
        rank: this one.
        world_size: how many there are.
        timeout_s: how long the others may take to come.

    Raises:
        OSError, RuntimeError: if the ranks cannot meet there.
    """
    is_torchruns = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if rank == 0 and not is_torchruns:
        here = address_to_listen_on(address, os.environ)
        return serve(here, port, clients=world_size, timeout_s=timeout_s)
    return dist.TCPStore(address, port, world_size, False, timeout=timedelta(seconds=timeout_s))
