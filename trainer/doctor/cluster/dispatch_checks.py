"""Checks of the dispatcher of a config, measured beside others on its ranks. Import no torch."""

from collections.abc import Iterator

from trainer.doctor.cluster.dispatch_evidence import DispatchEvidence
from trainer.doctor.finding import Check, Sign


def _wrong_dispatcher(dispatch: DispatchEvidence) -> Iterator[Sign]:
    own = dispatch.of(dispatch.own)
    if own is not None and own.fault is not None:
        others = f"use {dispatch.right[0].yaml}" if dispatch.right else "none is right: look at the links"
        yield Sign(f"parallel.dispatcher: {own.kind} is wrong on these ranks: {own.fault}", others)


def _slow_dispatcher(dispatch: DispatchEvidence) -> Iterator[Sign]:
    ratio = dispatch.times_slower(dispatch.own)
    if ratio is not None:
        fastest = dispatch.right[0]
        yield Sign(
            f"parallel.dispatcher: {dispatch.own} takes {ratio:.2f} times as long as {fastest.kind} for the rows of "
            "this config, there and back, forward and backward",
            f"set parallel.{fastest.yaml}",
        )


DISPATCH_CHECKS: tuple[Check[DispatchEvidence], ...] = (
    Check(
        name="wrong_dispatcher",
        severity="severe",
        find=_wrong_dispatcher,
        why="the loss looks right, and what is learned is not",
        source="ROCm/mori#675",
    ),
    Check(
        name="slow_dispatcher",
        severity="warning",
        find=_slow_dispatcher,
        why="every layer waits for its rows, twice forward and twice backward",
        source="arXiv 2412.19437, section 3.2.2",
    ),
)
