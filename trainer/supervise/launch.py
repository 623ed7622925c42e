"""Options of `launch`: the ranks of this node and the command that starts them."""

import os
import sys
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from trainer.distributed.interface import LOOPBACK, address_to_listen_on, listening_socket
from trainer.environment import SUPERVISOR, Variables, unknown_interfaces
from trainer.errors import ConfigError
from trainer.status import ATTEMPT

_SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
_MAX_LOCAL_RANKS = 1024
_SHUTDOWN, _SHUTDOWN_S = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600"
"""Seconds after a signal until torchrun kills ranks, since saving may take a while. After a rank has failed, torchrun
always kills the others 30 s later; torch 2.11 ignores the variable altogether."""
_RANK_VARIABLES = {
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME"),
    *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE"),
    *(f"TORCHELASTIC_{name}" for name in ("RUN_ID", "RESTART_COUNT", "MAX_RESTARTS", "USE_AGENT_STORE", "ERROR_FILE")),
    "TORCHELASTIC_SIGNALS_TO_HANDLE",
}
"""Environment variables that torchrun sets for a rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """The ranks of one run, and which of them this node starts."""

    nproc: int = 1
    nnodes: int = 1
    node_rank: int = 0
    master_addr: str = ""
    """Address of the first node; empty for one node."""
    master_port: int = 29500
    spares: int = 0
    """Machines beyond the nodes, numbered after them, which take the places of lost ones (supervise/seats.py)."""

    @classmethod
    def of(cls, options: Mapping[str, str | None], environment: Mapping[str, str]) -> "Launch":
        """Read command-line options as typed, with environment variables (NPROC, MASTER_ADDR, ...) as defaults.

        Raises:
            ConfigError: one line for each invalid value.
        """
        variables = Variables(environment)

        def number(name: str, default: int | None, least: int, most: int | None = None) -> int:
            return variables.number(name.upper(), least=least, most=most, default=default, option=options.get(name))

        nproc, nnodes, spares = number("nproc", 1, 1), number("nnodes", 1, 1), number("spares", 0, 0)
        launch = cls(nproc=nproc, nnodes=nnodes, spares=spares)
        if nproc > _MAX_LOCAL_RANKS:
            variables.problems.append(f"NPROC={nproc}: is more than {_MAX_LOCAL_RANKS} ranks on one node")
        if launch.num_machines > 1:
            launch = replace(launch, node_rank=number("node_rank", None, 0, launch.num_machines - 1))
        if nnodes > 1:
            address = options.get("master_addr") or environment.get("MASTER_ADDR", "")
            launch = replace(launch, master_addr=address, master_port=number("master_port", 29500, 1, 65535))
            if not launch.master_addr:
                variables.problems.append(f"NNODES={nnodes} needs MASTER_ADDR as well: the address of the first node")
        variables.number(_SHUTDOWN, least=0, most=10**6)
        if launch.world_size > 1:
            variables.problems += unknown_interfaces(environment)
        variables.check()
        return launch

    @property
    def world_size(self) -> int:
        """Ranks on all nodes."""
        return self.nproc * self.nnodes

    @property
    def num_machines(self) -> int:
        """Machines on which `launch` runs."""
        return self.nnodes + self.spares

    @property
    def is_spare(self) -> bool:
        """Return whether this machine has no node at first."""
        return self.node_rank >= self.nnodes

    @property
    def ranks(self) -> range:
        """Ranks of this node."""
        return range(self.node_rank * self.nproc, (self.node_rank + 1) * self.nproc)

    def check_port(self, environment: Mapping[str, str]) -> None:
        """Raise a ConfigError, on the first node, if the rendezvous port is in use or not permitted."""
        if self.nnodes == 1 or self.node_rank != 0:
            return
        address = address_to_listen_on(self.master_addr, environment)
        try:
            listening_socket(address, self.master_port).close()
        except OSError as error:
            raise ConfigError(
                f"MASTER_PORT={self.master_port}: cannot be used on this node ({address}): {error.strerror}; "
                "use another one, the same on every node"
            ) from None

    def command(self, arguments: Sequence[str]) -> list[str]:
        """Return the command for this node's ranks of `python -m trainer`: one directly, several by torchrun."""
        if self.world_size == 1:
            return [sys.executable, "-m", "trainer", *arguments]
        # On one node any free port will do, since no other node needs to know it.
        address, port = (self.master_addr, self.master_port) if self.nnodes > 1 else (LOOPBACK, 0)
        rendezvous = ["--nnodes", str(self.nnodes), "--node-rank", str(self.node_rank)]
        rendezvous += ["--master-addr", address, "--master-port", str(port), "--nproc-per-node", str(self.nproc)]
        return [sys.executable, "-m", "trainer.distributed.torchrun", *rendezvous, "-m", "trainer", *arguments]


def environment_of_attempt(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a new attempt: the given one with the attempt's name and settings for torchrun.

    Rank variables of other launchers are removed, and so are torchrun's defaults (PET_*): with PET_STANDALONE
    it would use a store that listens on all addresses, and unpickle values from it.
    """
    own = {ATTEMPT: uuid.uuid4().hex, SUPERVISOR: str(os.getpid())}
    if sys.flags.safe_path:  # torchrun does not pass on python -P
        own["PYTHONSAFEPATH"] = "1"
    signals = environment.get("TORCHELASTIC_SIGNALS_TO_HANDLE", _SIGNALS)
    removed = {name for name in environment if name in _RANK_VARIABLES or name.startswith("PET_")}
    given = {name: value for name, value in environment.items() if name not in removed}
    return {"PET_SIGNALS_TO_HANDLE": signals, _SHUTDOWN: _SHUTDOWN_S, **given, **own}
