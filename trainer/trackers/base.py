"""Trackers of a run's metrics: metrics.jsonl and routing.jsonl always, others optionally."""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from trainer.errors import CommError, RemoteRankError, exit_code_of
from trainer.metrics.log_content import LogContent
from trainer.trackers.jsonl import JsonlSink

_CLOSE_S = 10.0  # longest wait for each tracker at the end of a run, in seconds

Logged = Mapping[str, Any]
"""A line of metrics.jsonl or routing.jsonl."""


class Tracker(Protocol):
    """Destination of metrics. Its methods never raise, and `log` never blocks."""

    def log(self, record: Logged, experts: Logged | None = None) -> None:
        """Log a line of metrics.jsonl, and that of routing.jsonl of the same step; None for an evaluation."""

    def written(self) -> list[tuple[str, str]]:
        """Return labels with paths or addresses of what was written, for the last screen."""
        return []

    def close(self, exit_code: int, *, patience_s: float) -> None:
        """Write what is pending within `patience_s` seconds; `exit_code` is the run's."""


class JsonlTracker:
    """Writes metrics.jsonl, routing.jsonl and alarms.jsonl, the run's own record that other trackers are built from."""

    def __init__(
        self, metrics: Path, routing: Path, *, warn: Callable[[str], None], alarms: Path | None = None
    ) -> None:
        self._path = metrics
        self._alarms = None if alarms is None else JsonlSink(alarms, warn=warn)
        self._metrics, self._routing = JsonlSink(metrics, warn=warn), JsonlSink(routing, warn=warn)

    def resume_at(self, step: int, saved: object = None) -> None:
        """Drop the records after step `step`, which a resumed run logs again; `saved` is the checkpoint's `record`."""
        logs = saved if isinstance(saved, Mapping) else {}
        self._metrics.resume_at(step, LogContent.from_record(logs.get("metrics")))
        self._routing.resume_at(step, LogContent.from_record(logs.get("routing")))
        if self._alarms is not None:
            self._alarms.resume_at(step, LogContent.from_record(logs.get("alarms")))

    def record(self) -> dict[str, dict[str, int]]:
        """Return length and checksum of the logs for a checkpoint, as JSON values."""
        logs = {"metrics": self._metrics, "routing": self._routing}
        logs |= {} if self._alarms is None else {"alarms": self._alarms}
        return {name: log.content().record() for name, log in logs.items()}

    def log(self, record: Logged, experts: Logged | None = None) -> None:
        """Write the lines; they have reached the operating system on return."""
        if experts is not None:
            self._routing.write(experts)
        self._metrics.write(record)

    def log_alarm(self, event: Logged) -> None:
        """Write a line of alarms.jsonl."""
        if self._alarms is not None:
            self._alarms.write(event)

    def written(self) -> list[tuple[str, str]]:
        """Return the path of metrics.jsonl."""
        return [("metrics", str(self._path))]

    def close(self, exit_code: int, *, patience_s: float) -> None:
        """Close the files."""
        self._metrics.close()
        self._routing.close()
        if self._alarms is not None:
            self._alarms.close()


class PluginTracker:
    """Wraps a plug-in: after its first error it is dropped with a warning, and the run continues."""

    def __init__(self, kind: str, build: Callable[[], Tracker], *, warn: Callable[[str], None]) -> None:
        self._kind, self._warn = kind, warn
        self._tracker: Tracker | None = None
        with self._dropping_on_error():
            self._tracker = build()

    def log(self, record: Logged, experts: Logged | None = None) -> None:
        """Log a record."""
        with self._dropping_on_error():
            if self._tracker is not None:
                self._tracker.log(record, experts)

    def written(self) -> list[tuple[str, str]]:
        """Return what the tracker has written; nothing after an error."""
        with self._dropping_on_error():
            return [] if self._tracker is None else self._tracker.written()
        return []

    def close(self, exit_code: int, *, patience_s: float) -> None:
        """Close the tracker."""
        with self._dropping_on_error():
            if self._tracker is not None:
                self._tracker.close(exit_code, patience_s=patience_s)
        self._tracker = None

    @contextmanager
    def _dropping_on_error(self) -> Generator[None]:
        try:
            yield
        except Exception as error:
            self._tracker = None
            self._warn(f"metrics.trackers: {self._kind}: {type(error).__name__}: {error}; the run continues without it")


class Trackers:
    """All trackers of a run, empty on ranks other than 0; a context manager that closes them."""

    def __init__(self, trackers: Sequence[Tracker] = ()) -> None:
        self._trackers = list(trackers)
        self.exit_code = 0
        """Exit code of the run, unless it ends with an error."""

    def add(self, trackers: Sequence[Tracker]) -> None:
        """Add trackers, which get records from now on."""
        self._trackers += trackers

    def log(self, record: Logged, experts: Logged | None = None) -> None:
        """Log a record to all trackers."""
        for tracker in self._trackers:
            tracker.log(record, experts)

    def written(self) -> list[tuple[str, str]]:
        """Return what all trackers have written."""
        return [entry for tracker in self._trackers for entry in tracker.written()]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        code = self.exit_code if error is None else exit_code_of(error) or 1
        # If ranks are lost, or Ctrl-C was pressed twice, end at once.
        is_urgent = isinstance(error, CommError | RemoteRankError) or not isinstance(error, Exception | None)
        while self._trackers:
            self._trackers.pop().close(code, patience_s=0.0 if is_urgent else _CLOSE_S)
