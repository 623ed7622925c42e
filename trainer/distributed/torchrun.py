"""torchrun for a supervisor, `python -m trainer.distributed.torchrun`: it reports what ended its ranks, in silence.

torchrun itself exits with 1 whatever happened, and repeats every error in a page of its own.
"""

import json
import logging
import os
import sys
from typing import Any

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

from trainer.status import REPORT


def run() -> None:
    """Run torchrun with this process's arguments; exit with 1 if a rank failed or a signal came."""
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
    else:
        return
    sys.exit(1)


def _report(descriptor: int, report: dict[str, Any]) -> None:
    with os.fdopen(descriptor, "w") as file:
        json.dump(report, file)


if __name__ == "__main__":
    run()
