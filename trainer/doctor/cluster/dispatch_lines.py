"""Measurements of dispatchers as lines of a terminal. Imports no torch."""

from collections.abc import Iterator

from trainer.console.text_table import text_table
from trainer.doctor.cluster.dispatch_evidence import DispatchEvidence


def dispatch_lines(dispatch: DispatchEvidence) -> Iterator[str]:
    """Yield a table of dispatchers, and the line that chooses the fastest one."""
    rows = []
    for one in dispatch.speeds:
        times = ["-", "-"]
        if one.rounds is not None:
            times = [f"{1e3 * seconds:.2f} ms" for seconds in (one.rounds.median, one.rounds.best)]
        rows.append([one.kind, *times, one.fault or "exact"])
    rows += [[kind, "-", "-", why.split(";")[0]] for kind, why in dispatch.refused.items()]
    yield (
        f"{dispatch.tokens} tokens of a rank in {dispatch.dtype}, {dispatch.top_k} of {dispatch.num_experts} experts "
        f"over {dispatch.ep_size} ranks, d_model {dispatch.d_model}: there and back, forward and backward"
    )
    yield from text_table(["dispatcher", "usual", "best", "result"], rows, left=(0, 3))
    if dispatch.right:
        own, fastest = dispatch.of(dispatch.own), dispatch.right[0]
        is_alike = own is not None and own.rounds is not None and dispatch.times_slower(own.kind) is None
        also = f"; {dispatch.own}, as the config has it, is not surely slower" if is_alike and own != fastest else ""
        yield f"fastest: parallel.{fastest.yaml}{also}"
