"""torchrun for a supervisor, `python -m trainer.distributed.torchrun`, that reports in silence what has ended and how.

torchrun itself exits with 1 whatever happened, and repeats every error in a page of its own. Its store listens on all
addresses, and its rendezvous for one machine (`--standalone`) unpickles a key of it that anybody may write: here the
store listens on one address, and machines have their numbers (torchrun's static rendezvous), so nothing is unpickled.
"""

import json
import logging
import os
import sys
import threading
from typing import Any, Literal, NoReturn

from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import (
    RendezvousError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    rendezvous_handler_registry,
)
from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous

from trainer.distributed.interface import address_to_listen_on
from trainer.distributed.liveness_pipe import start_liveness_thread
from trainer.distributed.store import serve
from trainer.environment import Variables
from trainer.errors import CommError, ConfigError, first_line
from trainer.status import LIVENESS_FOLDER, REPORT
from trainer.terminal import print_safe

_BACKEND = "turnout"
_MEET_S = 600
"""Machines are started at different times: so long the first ones wait for the last."""
_LATE_S = 5.0


class Rendezvous(StaticTCPRendezvous):
    """Rendezvous of all machines' torchrun in a store on one address of the first machine."""

    def __init__(self, *place: Any, late: threading.Timer) -> None:
        """Prepare.

        Args:
            place: as torchrun's own has it.
            late: what happens if the store falls silent before the ranks run; then no timeout of torch's holds.
        """
        super().__init__(*place)
        self.late = late
        late.daemon = True
        late.start()

    def get_backend(self) -> str:
        """Return its name among torchrun's."""
        return _BACKEND

    def next_rendezvous(self) -> RendezvousInfo:
        """Wait for every machine.

        Raises:
            OSError, RuntimeError: if they cannot meet there.
        """
        if self._store is None and self.rank == 0:
            address = address_to_listen_on(self.master_addr, os.environ)
            seconds = self.timeout.total_seconds()
            store = serve(address, self.master_port, clients=self.world_size, timeout_s=seconds)
            self._store, self.master_addr, self.master_port = store, address, store.port  # as its ranks are told
        return super().next_rendezvous()

    def num_nodes_waiting(self) -> Literal[0]:
        """Return 0; torchrun asks from when its ranks run."""
        self.late.cancel()
        return 0


def run() -> NoReturn:
    """Run torchrun with this process's arguments; exit with 1 if a rank failed or a signal came, with 5 if it did."""
    descriptor = _descriptor()
    start_liveness_thread("torchrun")
    logging.disable(logging.ERROR)  # what it says of ranks is in the report
    options = torchrun.parse_args(sys.argv[1:])
    options.standalone = False  # whatever PET_STANDALONE says: it stands above the backend, and unpickles
    options.log_dir = os.environ.get(LIVENESS_FOLDER)  # what torchrun leaves there goes with the supervisor's own
    address, port = options.master_addr, options.master_port
    where = f"{address}:{port}"
    options.rdzv_backend, options.rdzv_endpoint = _BACKEND, where
    silent = {"error": _explained(f"the store there has not answered for {_MEET_S} s", where)}
    late = threading.Timer(_MEET_S + _LATE_S, _end, [descriptor, silent, CommError.exit_code])

    def meeting(parameters: RendezvousParameters) -> RendezvousHandler:
        return Rendezvous(address, port, options.node_rank, parameters.max_nodes, parameters.run_id, _MEET_S, late=late)

    rendezvous_handler_registry.register(_BACKEND, meeting)
    try:
        torchrun.run(options)
    except ChildFailedError as error:
        failures = [
            {"rank": rank, "pid": failure.pid, "code": failure.exitcode} for rank, failure in error.failures.items()
        ]
        _end(descriptor, {"failures": failures}, 1)
    except SignalException as error:
        _end(descriptor, {"signal": error.sigval.name}, 1)
    except (RuntimeError, OSError, RendezvousError) as error:  # of its store, which it has through the network
        _end(descriptor, {"error": _explained(first_line(error), where)}, CommError.exit_code)
    _end(descriptor, {}, 0)


def _descriptor() -> int:
    """Return where to report to, which is not for the ranks."""
    variables = Variables(os.environ)
    descriptor = variables.number(REPORT, least=0, default=None, note="; this module is started by launch")
    try:
        variables.check()
    except ConfigError as error:
        print_safe(error, file=sys.stderr)
        sys.exit(error.exit_code)
    del os.environ[REPORT]
    return descriptor


def _end(descriptor: int, report: dict[str, Any], exit_code: int) -> NoReturn:
    """Report, and end without waiting: not for the store, nor for python, which takes a second to forget torch."""
    with os.fdopen(descriptor, "w") as file:
        json.dump(report, file)
    os._exit(exit_code)


def _explained(reason: str, where: str) -> str:
    """Return torchrun's own failure in one line."""
    return (
        f"cannot meet the other machines through {where}: {reason}; check that "
        "every machine was started, with the same MASTER_ADDR and MASTER_PORT, and that the port is free on the first"
    )


if __name__ == "__main__":
    run()
