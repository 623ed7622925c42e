"""A limit to the memory that reading takes: a file of a kilobyte may ask for as much as it likes."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from trainer.errors import DataError

MAX_READING_BYTES = 4 << 30
"""More than a library needs for some rows that are allowed; what a file asks for beyond it is refused."""


@contextmanager
def bounded(where: str, remedy: str) -> Iterator[None]:
    """Let this process take at most MAX_READING_BYTES more memory in a block, on Linux; elsewhere nothing limits it.

    Raises:
        DataError: if the block asks for more.
    """
    before = resource.getrlimit(resource.RLIMIT_DATA)
    limit = _limit(before)
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, before[1]))
    try:
        yield
    except Exception as error:
        is_memory = isinstance(error, MemoryError) or "out of memory" in str(error)  # as pandas has it
        if not is_memory or limit is None:  # then it was not this limit
            raise
        raise DataError(
            f"{where}: asks for more than {MAX_READING_BYTES >> 20} MiB of memory; reading some rows may take as much; "
            f"{remedy}"
        ) from error
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def _limit(before: tuple[int, int]) -> int | None:
    """Return the limit of private memory to set; None where one that is lower is set already, or it is not known."""
    with suppress(OSError, StopIteration, ValueError, IndexError):
        lines = Path("/proc/self/status").read_text().splitlines()
        used_bytes = 1024 * int(next(line for line in lines if line.startswith("VmData:")).split()[1])
        limit = used_bytes + MAX_READING_BYTES
        if all(set_already == resource.RLIM_INFINITY or limit < set_already for set_already in before):
            return limit
    return None
