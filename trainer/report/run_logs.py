"""Logs of a run as a page needs them: read once, in the order of steps, the newest record of a step last."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from trainer.report.curve_chart import Curve
from trainer.runs.recorded_log import RecordedLog, read_log
from trainer.runs.recorded_run import RecordedRun

_LARGEST: Final = 1e100
_MAX_COUNT: Final = 1 << 53


@dataclass(frozen=True, slots=True, kw_only=True)
class RunLogs:
    """Logs that a run wrote while it trained."""

    name: str
    metrics: RecordedLog
    routing: RecordedLog
    alarms: RecordedLog

    def curve(self, key: str, name: str, *, colour: int = 0, dash: int = 0) -> Curve:
        """Return a metric over steps; a step that was trained again has its newest value.

        What no picture has room for is not a number: such values overflow where they are added or scaled.
        """
        newest = dict(zip(*self.metrics.series(key), strict=True))
        steps = sorted(newest)
        values = [newest[step] if abs(newest[step]) < _LARGEST else math.nan for step in steps]
        return Curve(name=name, steps=steps, values=values, colour=colour, dash=dash)

    def keys(self, prefix: str, suffix: str = "") -> list[str]:
        """Return the metrics whose names begin and end so, in the order of their first records."""
        seen = dict.fromkeys(key for record in self.metrics.records for key in record)
        return [key for key in seen if key.startswith(prefix) and key.endswith(suffix)]

    def counts(self) -> Iterator[tuple[int, list[list[float]]]]:
        """Yield a step and the assignments (layers, experts) in it, for records of one shape."""
        newest = {record["step"]: record.get("counts") for record in self.routing.records}
        shape = None
        for step in sorted(newest):
            counts = _matrix(newest[step])
            if counts is None:
                continue
            shape = shape or (len(counts), len(counts[0]))
            if (len(counts), len(counts[0])) == shape:
                yield step, counts


def read_run_logs(runs: Sequence[RecordedRun]) -> list[RunLogs]:
    """Read the logs of runs, which get names that tell them apart."""
    names = [run.path.name for run in runs]
    short = [name if names.count(name) == 1 else str(run.path) for name, run in zip(names, runs, strict=True)]
    return [
        RunLogs(
            name=name or str(run.path.resolve().name),
            metrics=read_log(run.folder.metrics),
            routing=read_log(run.folder.routing),
            alarms=read_log(run.folder.alarms),
        )
        for name, run in zip(short, runs, strict=True)
    ]


def _matrix(value: Any) -> list[list[float]] | None:
    """Return a value of a log if it is a rectangle of counts."""
    if not isinstance(value, list) or not value or not all(isinstance(row, list) and row for row in value):
        return None
    is_whole = all(len(row) == len(value[0]) and all(map(_is_count, row)) for row in value)
    return value if is_whole else None


def _is_count(value: object) -> bool:
    return type(value) in (int, float) and 0 <= value <= _MAX_COUNT  # type: ignore[operator]  # NaN is not
