"""torchrun for a supervisor, `python -m trainer.distributed.torchrun`, that reports in silence what has ended and how.

torchrun itself exits with 1 whatever happened, and repeats every error in a page of its own.
"""

import json
import logging
import os
import sys
from typing import Any

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.run import main, parse_args

from trainer.errors import CommError, first_line
from trainer.status import REPORT


def run() -> None:
    """Run torchrun with this process's arguments; exit with 1 if a rank failed or a signal came, with 5 if it did."""
    descriptor = int(os.environ.pop(REPORT))  # not for the ranks
    logging.disable(logging.ERROR)  # what it says of ranks is in the report
    try:
        main()
    except ChildFailedError as error:
        failures = [
            {"rank": rank, "pid": failure.pid, "code": failure.exitcode} for rank, failure in error.failures.items()
        ]
        _report(descriptor, {"failures": failures})
    except SignalException as error:
        _report(descriptor, {"signal": error.sigval.name})
    except (RuntimeError, RendezvousError) as error:  # of its store, which it has through the network
        _report(descriptor, {"error": _explained(error)})
        sys.exit(CommError.exit_code)
    else:
        return
    sys.exit(1)


def _explained(error: Exception) -> str:
    """Return torchrun's own failure in one line."""
    reason = first_line(error)
    options = parse_args(sys.argv[1:])
    if options.standalone:
        return reason
    return (
        f"cannot meet the other machines through {options.master_addr}:{options.master_port}: {reason}; check that "
        "every machine was started, with the same MASTER_ADDR and MASTER_PORT, and that the port is free on the first"
    )


def _report(descriptor: int, report: dict[str, Any]) -> None:
    with os.fdopen(descriptor, "w") as file:
        json.dump(report, file)


if __name__ == "__main__":
    run()
