"""The figures of a run by which runs are compared: how far it came, its losses, its time. Imports no torch."""

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from trainer.checkpoint.ancestors import ancestors
from trainer.checkpoint.run_folder import RunFolder
from trainer.runs.recorded_log import RecordedLog, finite, read_log
from trainer.runs.run_state import RunProgress, read_state

_LATE: Final = 0.9  # a training loss is the mean over the steps after this fraction of them: one step's is noise

_MAX_TOKENS: Final = 1 << 53  # more is damage


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFigures:
    """Figures of one run; None for what its log does not have."""

    tokens: int | None
    loss: float | None
    """Training loss: mean over the last tenth of the logged steps, in nats per token."""
    eval_loss: float | None
    """Newest held-out loss, in nats per token."""
    bits_per_byte: float | None
    eval_step: int | None
    """Step of the newest evaluation."""
    tokens_per_s: float | None
    train_s: float | None
    """Time of all logged steps together, over all starts of the run, without evaluations and saves."""
    drop_rate: float | None
    load_imbalance: float | None

    def record(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class ListedRun:
    """One run of a table."""

    path: Path
    state: RunProgress
    figures: RunFigures
    parent: str | None
    """Its origin, such as `base at step 300 (branch)`."""
    log: RecordedLog

    def record(self) -> dict[str, Any]:
        """Return JSON values, without the log."""
        return {"run": str(self.path), **self.state.record(), **self.figures.record(), "parent": self.parent}


def read_listed_run(path: Path, *, keeps_log: bool = True) -> ListedRun:
    """Read state, figures and parent of the run in a folder; of many runs, the logs are too large to keep."""
    log = read_log(RunFolder(path).metrics)
    chain = ancestors(RunFolder(path))
    return ListedRun(
        path=path,
        state=read_state(path, log),
        figures=figures_of(log),
        parent=chain[0].text if chain else None,
        log=log if keeps_log else RecordedLog(),
    )


def figures_of(log: RecordedLog) -> RunFigures:
    """Return the figures of a log."""
    tokens = log.newest("tokens")
    evaluated = [record["step"] for record in log.records if finite(record, "eval/loss") is not None]
    return RunFigures(
        tokens=None if tokens is None or abs(tokens) > _MAX_TOKENS else int(tokens),
        loss=late_mean(log, "loss"),
        eval_loss=log.newest("eval/loss"),
        bits_per_byte=log.newest("eval/bits_per_byte"),
        eval_step=evaluated[-1] if evaluated else None,
        tokens_per_s=_median(log, "tokens_per_s"),
        train_s=train_seconds(log.records) or None,
        drop_rate=late_mean(log, "drop_rate"),
        load_imbalance=late_mean(log, "load_imbalance"),
    )


def late_mean(log: RecordedLog, key: str) -> float | None:
    """Return the mean of a metric over the last tenth of the steps; None without a finite value there."""
    after = _LATE * log.last_step
    late = [value for record in log.records if record["step"] > after and (value := finite(record, key)) is not None]
    return statistics.fmean(late) if late else None


def _median(log: RecordedLog, key: str) -> float | None:
    values = [value for record in log.records if (value := finite(record, key)) is not None]
    return statistics.median(values) if values else None


def train_seconds(records: Iterable[Mapping[str, Any]]) -> float:
    """Return the seconds of all steps of a log, of all starts of the run: each record has the mean since the last."""
    seconds, before = 0.0, 0
    for record in records:
        mean = finite(record, "step_s")
        if mean is not None and mean > 0:
            seconds, before = seconds + mean * max(0, record["step"] - before), record["step"]
    return seconds if math.isfinite(seconds) else 0.0
