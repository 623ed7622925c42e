"""A memory limit for reading: a file of a kilobyte can request gigabytes."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from trainer.errors import DataError

MAX_READING_BYTES = 4 << 30  # limit of extra memory; more than any library needs for a batch of records of allowed size


@contextmanager
def limit_memory(where: str, remedy: str) -> Iterator[None]:
    """Let this process allocate at most MAX_READING_BYTES more inside the block, or raise DataError. Linux only."""
    before = resource.getrlimit(resource.RLIMIT_DATA)
    limit = _new_limit(before)
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, before[1]))
    try:
        yield
    except Exception as error:
        is_memory = isinstance(error, MemoryError) or "out of memory" in str(error)  # the latter from pandas
        if not is_memory or limit is None:  # not caused by this limit
            raise
        raise DataError(
            f"{where}: needs more than {MAX_READING_BYTES >> 20} MiB of memory to read a few records; that is the "
            f"limit; {remedy}"
        ) from error
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def _new_limit(before: tuple[int, int]) -> int | None:
    """Return the limit of private memory to set; None if a lower one is set already or current use is unknown."""
    with suppress(OSError, StopIteration, ValueError, IndexError):
        lines = Path("/proc/self/status").read_text().splitlines()
        used_bytes = 1024 * int(next(line for line in lines if line.startswith("VmData:")).split()[1])
        limit = used_bytes + MAX_READING_BYTES
        if all(existing == resource.RLIM_INFINITY or limit < existing for existing in before):
            return limit
    return None
