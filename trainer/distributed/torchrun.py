"""torchrun for a supervisor, `python -m trainer.distributed.torchrun`: reports through a pipe which ranks failed.

torchrun itself exits with 1 for every failure, and prints a page for each error. Its store listens on all addresses,
and its rendezvous for one node (`--standalone`) unpickles a key that anyone can write. Here the store listens on one
address and nodes are numbered (torchrun's static rendezvous), so that nothing is unpickled.
"""

import json
import logging
import os
import sys
import threading
from typing import Any, Literal, NoReturn

from torch.distributed import run as torchrun
from torch.distributed.elastic import rendezvous
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous

from trainer.distributed.interface import address_to_listen_on
from trainer.distributed.liveness_pipe import start_liveness_thread
from trainer.distributed.store import serve
from trainer.environment import Variables
from trainer.errors import CommError, ConfigError, first_line
from trainer.status import LIVENESS_FOLDER, REPORT
from trainer.terminal import print_safe

_BACKEND = "turnout"
_RENDEZVOUS_S = 600  # nodes start at different times
_GRACE_S = 5.0


class Rendezvous(StaticTCPRendezvous):
    """Static rendezvous of the nodes in a store that listens on one address of the first node.

    The timer `late` reports a failure if the store falls silent before the ranks run, which torch's timeouts do not
    cover.
    """

    def __init__(self, *place: Any, late: threading.Timer) -> None:
        super().__init__(*place)
        self.late = late
        late.daemon = True
        late.start()

    def get_backend(self) -> str:
        """Return the name of this rendezvous backend."""
        return _BACKEND

    def next_rendezvous(self) -> rendezvous.RendezvousInfo:
        """Wait for all nodes."""
        if self._store is None and self.rank == 0:
            address = address_to_listen_on(self.master_addr, os.environ)
            seconds = self.timeout.total_seconds()
            store = serve(address, self.master_port, clients=self.world_size, timeout_s=seconds)
            self._store, self.master_addr, self.master_port = store, address, store.port  # passed on to the ranks
        return super().next_rendezvous()

    def num_nodes_waiting(self) -> Literal[0]:
        """Return 0. torchrun first calls this once its ranks run, so the timer is cancelled."""
        self.late.cancel()
        return 0


def run() -> NoReturn:
    """Run torchrun; exit with 1 after a failed rank or a signal, with 5 if torchrun itself failed."""
    descriptor = _descriptor()
    start_liveness_thread("torchrun")
    logging.disable(logging.ERROR)  # its messages about ranks are in the report
    options = torchrun.parse_args(sys.argv[1:])
    options.standalone = False  # even if PET_STANDALONE is set, which would override the backend and unpickle
    options.log_dir = os.environ.get(LIVENESS_FOLDER)  # removed together with the supervisor's temporary folder
    address, port = options.master_addr, options.master_port
    options.rdzv_backend, options.rdzv_endpoint = _BACKEND, f"{address}:{port}"
    failure = f"cannot connect to the other nodes through {address}:{port}"
    advice = "check that every node was started, with the same MASTER_ADDR and MASTER_PORT"
    advice += ", and that the port is free on the first"
    silent = {"error": f"{failure}: the store there has not answered for {_RENDEZVOUS_S} s; {advice}"}
    late = threading.Timer(_RENDEZVOUS_S + _GRACE_S, _end, [descriptor, silent, CommError.exit_code])

    def make_handler(parameters: rendezvous.RendezvousParameters) -> rendezvous.RendezvousHandler:
        nodes, run_id = parameters.max_nodes, parameters.run_id
        return Rendezvous(address, port, options.node_rank, nodes, run_id, _RENDEZVOUS_S, late=late)

    rendezvous.rendezvous_handler_registry.register(_BACKEND, make_handler)
    try:
        torchrun.run(options)
    except ChildFailedError as error:
        failures = [{"rank": rank, "pid": one.pid, "code": one.exitcode} for rank, one in error.failures.items()]
        _end(descriptor, {"failures": failures}, 1)
    except SignalException as error:
        _end(descriptor, {"signal": error.sigval.name}, 1)
    except (RuntimeError, OSError, rendezvous.RendezvousError) as error:  # from its store, over the network
        _end(descriptor, {"error": f"{failure}: {first_line(error)}; {advice}"}, CommError.exit_code)
    _end(descriptor, {}, 0)


def _descriptor() -> int:
    """Return the descriptor of the report pipe, and remove it from the environment of the ranks."""
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
    """Write the report and exit at once, without waiting for the store or a second for Python to unload torch."""
    with os.fdopen(descriptor, "w") as file:
        json.dump(report, file)
    os._exit(exit_code)


if __name__ == "__main__":
    run()
