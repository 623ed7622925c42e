"""Ranks that this machine starts, and the command that starts them."""

import os
import sys
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trainer.distributed.interface import LOOPBACK, address_to_listen_on, listening_socket
from trainer.environment import SUPERVISOR, Variables, unknown_interfaces
from trainer.errors import ConfigError
from trainer.status import ATTEMPT

_SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
_MOST_RANKS_HERE = 1024
_SHUTDOWN, _SHUTDOWN_S = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600"
"""torchrun kills ranks that have not ended so long after a signal: saving may take a while. After the failure of a rank
it kills the others 30 s later, whatever this says; and torch 2.11 knows no other time at all."""
_OF_A_RANK = {
    *("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME"),
    *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE"),
    *(f"TORCHELASTIC_{name}" for name in ("RUN_ID", "RESTART_COUNT", "MAX_RESTARTS", "USE_AGENT_STORE", "ERROR_FILE")),
    "TORCHELASTIC_SIGNALS_TO_HANDLE",
}
"""Environment variables by which torchrun tells a rank what it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """The ranks of one run, as this machine sees them."""

    nproc: int = 1
    """Ranks on this machine, and on every other one."""
    nnodes: int = 1
    """Machines."""
    node_rank: int = 0
    """This machine's number, from 0."""
    master_addr: str = ""
    """Address of the first machine, where there are several."""
    master_port: int = 29500
    """Port there where ranks meet."""

    @classmethod
    def of(cls, options: Mapping[str, str | None], environment: Mapping[str, str]) -> "Launch":
        """Read command-line options, and environment variables where an option is not given.

        Args:
            options: `nproc`, `nnodes`, `node_rank`, `master_addr`, `master_port`, as they were typed.
            environment: with NPROC, NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT.

        Raises:
            ConfigError: one line for each value that cannot be.
        """
        variables = Variables(environment)

        def number(name: str, default: int | None, least: int, most: int | None = None) -> int:
            return variables.number(name.upper(), least=least, most=most, default=default, option=options.get(name))

        nproc, nnodes = number("nproc", 1, 1), number("nnodes", 1, 1)
        launch = cls(nproc=nproc, nnodes=nnodes)
        if nproc > _MOST_RANKS_HERE:
            variables.problems.append(f"NPROC={nproc}: is more than {_MOST_RANKS_HERE} ranks on one machine")
        if nnodes > 1:
            launch = cls(
                nproc=nproc,
                nnodes=nnodes,
                node_rank=number("node_rank", None, 0, nnodes - 1),
                master_addr=options.get("master_addr") or environment.get("MASTER_ADDR", ""),
                master_port=number("master_port", 29500, 1, 65535),
            )
            if not launch.master_addr:
                variables.problems.append(
                    f"NNODES={nnodes} needs MASTER_ADDR as well: the address of the first machine"
                )
        variables.number(_SHUTDOWN, least=0, most=10**6)
        if launch.world_size > 1:
            variables.problems += unknown_interfaces(environment)
        variables.check()
        return launch

    @property
    def world_size(self) -> int:
        """Ranks on all machines."""
        return self.nproc * self.nnodes

    @property
    def ranks(self) -> range:
        """Ranks of this machine."""
        return range(self.node_rank * self.nproc, (self.node_rank + 1) * self.nproc)

    def check_port(self, environment: Mapping[str, str]) -> None:
        """Refuse a port that is taken, on the machine whose port it is.

        Args:
            environment: may name the interface between the machines.

        Raises:
            ConfigError: if another process listens there, or this one may not.
        """
        if self.nnodes == 1 or self.node_rank != 0:
            return
        address = address_to_listen_on(self.master_addr, environment)
        try:
            listening_socket(address, self.master_port).close()
        except OSError as error:
            raise ConfigError(
                f"MASTER_PORT={self.master_port}: cannot be used on this machine ({address}): {error.strerror}; "
                "use another one, the same on every machine"
            ) from None

    def command(self, arguments: Sequence[str]) -> list[str]:
        """Return the command that starts this machine's ranks: one directly, several by torchrun.

        Args:
            arguments: of `python -m trainer`, the same for every rank.
        """
        if self.world_size == 1:
            return [sys.executable, "-m", "trainer", *arguments]
        # Of one machine nobody else knows where its ranks meet: any free port.
        address, port = (self.master_addr, self.master_port) if self.nnodes > 1 else (LOOPBACK, 0)
        meeting = ["--nnodes", str(self.nnodes), "--node-rank", str(self.node_rank)]
        meeting += ["--master-addr", address, "--master-port", str(port)]
        torchrun = [sys.executable, "-m", "trainer.distributed.torchrun", *meeting, "--nproc-per-node", str(self.nproc)]
        return [*torchrun, "-m", "trainer", *arguments]


def environment_of_attempt(environment: Mapping[str, str]) -> dict[str, str]:
    """Return a new attempt's environment: the given one with the attempt's name and what torchrun should know.

    What another launcher says of ranks is left out: the ranks of an attempt are this one's alone. So are defaults of
    torchrun's options (PET_*): with PET_STANDALONE it would meet in a store that listens to everybody, and unpickle it.
    """
    own = {ATTEMPT: uuid.uuid4().hex, SUPERVISOR: str(os.getpid())}
    if sys.flags.safe_path:  # python -P is not handed down by torchrun
        own["PYTHONSAFEPATH"] = "1"
    defaults = {
        "PET_SIGNALS_TO_HANDLE": environment.get("TORCHELASTIC_SIGNALS_TO_HANDLE", _SIGNALS),
        _SHUTDOWN: _SHUTDOWN_S,
    }
    given = {
        name: value for name, value in environment.items() if name not in _OF_A_RANK and not name.startswith("PET_")
    }
    return {**defaults, **given, **own}
