"""Errors that a user can meet, each with its exit code.

Each of these is for a person: the command line prints its message as it stands, without a traceback, and exits with
`exit_code`. The message follows one formula: where: what is wrong, with the values; what is allowed; what to do.
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager


class TurnoutError(Exception):
    """Base of every error that its reader can fix."""

    exit_code = 1
    is_on_every_rank = False
    """Every rank has it, or it concerns the exchange itself: there is nobody to tell."""
    is_rank_specific = False
    """This rank alone has it, and so is the one to show it; what all ranks have is shown by rank 0."""


class ConfigError(TurnoutError):
    """The experiment file, an override or the command line is wrong. One line for each problem."""

    exit_code = 2


class DataError(TurnoutError):
    """A data file is missing, empty, unreadable or not what it was."""

    exit_code = 3


class MissingFile(DataError):
    """A file that the config names is not there."""


class CheckpointError(TurnoutError):
    """A checkpoint is missing, damaged or belongs to another model."""

    exit_code = 4


class CommError(TurnoutError):
    """A peer was lost or ranks disagree."""

    exit_code = 5
    is_on_every_rank = is_rank_specific = True


class DivergedError(TurnoutError):
    """Copies of the same numbers have come apart: a fault of some memory, which may not happen again."""

    exit_code = CommError.exit_code


class RemoteRankError(TurnoutError):
    """Another rank failed and has said so; this one only ends with it, and in silence."""

    is_on_every_rank = True

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class NumericsError(TurnoutError):
    """Training left the finite numbers and did not come back."""

    exit_code = 6


class ResourceError(TurnoutError):
    """The machine ran out of disk or memory."""

    exit_code = 7


class MemoryExhausted(ResourceError):
    """Memory has run out on this rank; what helps hangs on what it was doing."""

    is_rank_specific = True


PREEMPTED = 75
"""Exit code of a run that was asked to stop and lost nothing; starting it again continues it."""


class StopRequested(BaseException):
    """A run was asked to stop before its first step. Like KeyboardInterrupt, no `except Exception` holds it up."""

    exit_code = PREEMPTED


_TOO_LARGE = ("can't allocate memory", "Storage size calculation overflowed", "multiplication overflow")
"""Messages of torch on a CPU for a tensor that does not fit, in memory or in any number of bytes."""
INTERRUPTED = 130
"""Exit code of a process that Ctrl-C has ended, as shells have it."""


def exit_code_of(error: BaseException) -> int | None:
    """Return the exit code of a process that an error has ended; None for a bug, which Python shows and makes 1 of."""
    match error:
        case TurnoutError() | StopRequested():
            return error.exit_code
        case KeyboardInterrupt():
            return INTERRUPTED
        case BrokenPipeError():  # the reader of our output has left, as head does
            return 0
        case OSError() if error.filename is not None:  # of the user, who may have typed it
            return ConfigError.exit_code if error.errno == errno.ENAMETOOLONG else ResourceError.exit_code
        case Exception() if is_out_of_memory(error):
            return ResourceError.exit_code
    return None


def first_line(error: BaseException) -> str:
    """Return what an error of somebody else says, in a line; its kind if it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


@contextmanager
def explain_out_of_memory(doing: str, advice: str) -> Iterator[None]:
    """Say what helps where memory runs out in a block.

    Raises:
        MemoryExhausted: in place of whatever error says that it has.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, TurnoutError) or not is_out_of_memory(error):
            raise
        raise MemoryExhausted(f"out of memory while {doing}: {first_line(error)}; {advice}") from None


def is_out_of_memory(error: Exception) -> bool:
    """Tell memory that ran out from other failures; torch has a class of its own for it only on a GPU."""
    names = {kind.__name__ for kind in type(error).__mro__}
    is_said = isinstance(error, RuntimeError) and any(words in str(error) for words in _TOO_LARGE)
    return is_said or bool(names & {"MemoryError", "OutOfMemoryError"})
