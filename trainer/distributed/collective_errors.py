"""Propagate one rank's error to all ranks, so that none waits for a rank that has failed."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from trainer.distributed.collectives import Group
from trainer.distributed.wire_format import Plain
from trainer.errors import RemoteRankError, TurnoutError, exit_code_of


@contextmanager
def raise_together(group: Group) -> Iterator[None]:
    """Run a block on all ranks of a group; if it fails on one of them, fail on all, with the same exit code.

    The first rank that failed raises its error with its number in front; the others raise a `RemoteRankError`, which is
    not shown again. A failed collective is raised as it is, since its group cannot be used any more.

    Raises:
        TurnoutError: the error of the first rank that failed, or a `RemoteRankError` with its exit code.
    """
    if group.size == 1:
        yield
        return
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        if isinstance(caught, TurnoutError) and caught.is_on_every_rank:
            raise
        error = caught
    wait_for_all(group)
    if not group.any(error is not None):
        return
    reports = group.all_gather_objects(None if error is None else _report(error))
    first = next(rank for rank, report in enumerate(reports) if report is not None)
    text, exit_code = reports[first]
    if group.index != first:
        raise RemoteRankError(f"rank {group.ranks[first]}: {text}", exit_code) from None
    assert error is not None
    if isinstance(error, TurnoutError):
        shown = type(error)(f"rank {group.ranks[first]}: {error}")
        shown.is_rank_specific = True
        raise shown from None
    raise error


def wait_for_all(group: Group) -> None:
    """Wait for all ranks, however long one reads text or writes files; a TurnoutError if one is lost."""
    if group.watch is not None:
        group.watch.barrier()


def barrier_gather(group: Group, value: Plain) -> list[Any]:
    """Return the values of all ranks, once all are here, however long one takes; a TurnoutError if one is lost."""
    wait_for_all(group)
    return group.all_gather_objects(value)


def _report(error: Exception) -> tuple[str, int]:
    if isinstance(error, TurnoutError):
        return str(error), error.exit_code
    return "".join(traceback.format_exception_only(error)).strip(), exit_code_of(error) or 1
