"""Become a process of a host of tests/two_hosts.sh, and run this project there: for forks, which no nsenter starts.

python -m tests.on_host NUMBER CLOCK_S ARGUMENTS...     as `python -m trainer ARGUMENTS` on a host whose clocks are
                                                        ahead by so many seconds (negative: behind)
"""

import ctypes
import os
import runpy
import signal
import sys
import time
from pathlib import Path

from trainer.supervise.die_with_parent import end_with

_NEW_TIME, _NEW_NAMES, _NEW_NETWORK = 0x80, 0x04000000, 0x40000000
_MONOTONIC, _SINCE_BOOT = 1, 7


def join_network(number: int) -> None:
    """Enter the network namespace of a host, and take its name.

    Raises:
        OSError: if this is not permitted.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    with Path(f"/run/netns/host{number}").open() as network:
        name = f"host{number}".encode()
        if libc.setns(network.fileno(), _NEW_NETWORK) or libc.unshare(_NEW_NAMES) or libc.sethostname(name, len(name)):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), f"host{number}")


def set_clocks(ahead_s: int) -> None:
    """Set the wall clock of this process and its forks ahead, and the monotonic one, if it is ahead, of the forks.

    Linux has no wall clock of a namespace, so that one is Python's `time.time` alone.
    """
    clock = time.time
    setattr(time, "time", lambda: clock() + ahead_s)  # noqa: B010 - type checkers know that it is a function
    if ahead_s > 0 and ctypes.CDLL(None).unshare(_NEW_TIME) == 0:
        offsets = "".join(f"{number} {ahead_s} 0\n" for number in (_MONOTONIC, _SINCE_BOOT))
        Path("/proc/self/timens_offsets").write_text(offsets)


def main() -> None:
    """Enter the host, and run."""
    number, ahead_s, *arguments = sys.argv[1:]
    join_network(int(number))
    if int(ahead_s):
        set_clocks(int(ahead_s))
        here = os.getpid()
        pid = os.fork()  # which has the new monotonic clock
        if pid:
            signal.signal(signal.SIGTERM, lambda *_: os.kill(pid, signal.SIGTERM))
            os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) & 0xFF)
        end_with(here)()
    sys.argv = ["trainer", *arguments]
    runpy.run_module("trainer", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
