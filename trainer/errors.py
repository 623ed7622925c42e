"""Errors for users, each with its exit code.

The command line prints the message without a traceback and exits with `exit_code`. Messages follow one formula: where:
what is wrong, with the values; what is allowed; what to do.
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager


class TurnoutError(Exception):
    """Base class of errors that a user can fix."""

    exit_code = 1
    is_on_every_rank = False
    """Raised on every rank, or about the communication itself, so that it is not sent to other ranks."""
    is_rank_specific = False
    """Raised on this rank alone, which therefore prints it; errors of all ranks are printed by rank 0."""


class ConfigError(TurnoutError):
    """The config, an override or the command line is wrong; one line for each problem."""

    exit_code = 2


class DataError(TurnoutError):
    """A data file is missing, empty, unreadable or changed."""

    exit_code = 3


class MissingFile(DataError):
    """A file that the config names does not exist."""


class CheckpointError(TurnoutError):
    """A checkpoint is missing, damaged or belongs to another model."""

    exit_code = 4


class CommError(TurnoutError):
    """A rank was lost, or ranks disagree."""

    exit_code = 5
    is_on_every_rank = is_rank_specific = True


class DivergedError(TurnoutError):
    """Replicated tensors differ: a memory error, which may not recur."""

    exit_code = CommError.exit_code


class RemoteRankError(TurnoutError):
    """Another rank failed and reports it; this one exits without a message."""

    is_on_every_rank = True

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class NumericsError(TurnoutError):
    """Training diverged: loss, gradients or weights are not finite."""

    exit_code = 6


class ResourceError(TurnoutError):
    """The machine ran out of disk or memory."""

    exit_code = 7


class MemoryExhausted(ResourceError):
    """This rank ran out of memory; the message has advice for what it was doing."""

    is_rank_specific = True


PREEMPTED = 75
"""Exit code of a run that stopped on request and can be continued."""


class StopRequested(BaseException):
    """A stop was requested before the first step. A BaseException, so that `except Exception` does not catch it."""

    exit_code = PREEMPTED


_TOO_LARGE = ("can't allocate memory", "Storage size calculation overflowed", "multiplication overflow")
"""Parts of torch's messages on a CPU if a tensor exceeds memory or the range of sizes."""
INTERRUPTED = 130
"""Exit code after Ctrl-C, as in shells."""


def exit_code_of(error: BaseException) -> int | None:
    """Return the exit code for an error; None for a bug, for which Python prints a traceback and exits with 1."""
    match error:
        case TurnoutError() | StopRequested():
            return error.exit_code
        case KeyboardInterrupt():
            return INTERRUPTED
        case BrokenPipeError():  # the reader of our output has exited, such as head
            return 0
        case OSError() if error.filename is not None:  # a path that the user may have typed
            return ConfigError.exit_code if error.errno == errno.ENAMETOOLONG else ResourceError.exit_code
        case Exception() if is_out_of_memory(error):
            return ResourceError.exit_code
    return None


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message; its class name if it is empty."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


@contextmanager
def explain_out_of_memory(doing: str, advice: str) -> Iterator[None]:
    """Convert out-of-memory errors of a block into one with advice.

    Raises:
        MemoryExhausted: in place of an out-of-memory error.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, TurnoutError) or not is_out_of_memory(error):
            raise
        raise MemoryExhausted(f"out of memory while {doing}: {first_line(error)}; {advice}") from None


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error means out of memory; torch has its own class for it only on GPUs."""
    names = {kind.__name__ for kind in type(error).__mro__}
    is_said = isinstance(error, RuntimeError) and any(words in str(error) for words in _TOO_LARGE)
    return is_said or bool(names & {"MemoryError", "OutOfMemoryError"})
