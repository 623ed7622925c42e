"""Trackers of a run's records: metrics.jsonl and routing.jsonl always; others beside them, which may fail."""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from trainer.errors import CommError, RemoteRankError, exit_code_of
from trainer.metrics.log_content import LogContent
from trainer.trackers.jsonl import JsonlSink

_LAST_CHANCE_S = 10.0
"""A run waits so long at its end for those who keep its records."""

Logged = Mapping[str, Any]
"""A line of metrics.jsonl or routing.jsonl."""


class Tracker(Protocol):
    """Keeps records. Whatever happens to it, it neither raises nor makes the run wait."""

    def log(self, record: Logged, experts: Logged | None = None) -> None:
        """Keep a record.

        Args:
            record: a line of metrics.jsonl.
            experts: what the MoE layers did in the same step, a line of routing.jsonl; None beside an evaluation.
        """
        ...

    def written(self) -> list[tuple[str, str]]:
        """Return what it keeps and where that is, for the last screen: a label and a path or an address."""
        ...

    def close(self, exit_code: int, *, patience_s: float) -> None:
        """Keep what is not safe yet, for so long at most; the run has ended with this code."""
        ...


class JsonlTracker:
    """The truth: a line in metrics.jsonl for each record, and one in routing.jsonl."""

    def __init__(self, metrics: Path, routing: Path, *, warn: Callable[[str], None]) -> None:
        self._path = metrics
        self._metrics, self._routing = JsonlSink(metrics, warn=warn), JsonlSink(routing, warn=warn)

    def resume_at(self, step: int, known: object = None) -> None:
        """Forget what a run that resumes from completed step `step` will log again.

        Args:
            step: completed steps.
            known: what the checkpoint says that `record` gave.
        """
        logs = known if isinstance(known, Mapping) else {}
        self._metrics.resume_at(step, LogContent.recorded(logs.get("metrics")))
        self._routing.resume_at(step, LogContent.recorded(logs.get("routing")))

    def record(self) -> dict[str, dict[str, int]]:
        """Return what a checkpoint remembers of the logs, in JSON values."""
        return {"metrics": self._metrics.content().record(), "routing": self._routing.content().record()}

    def log(self, record: Logged, experts: Logged | None = None) -> None:
        """Write the lines; they are in the hands of the operating system on return."""
        if experts is not None:
            self._routing.write(experts)
        self._metrics.write(record)

    def written(self) -> list[tuple[str, str]]:
        """Return the file of metrics."""
        return [("metrics", str(self._path))]

    def close(self, exit_code: int, *, patience_s: float) -> None:
        """Close the files."""
        self._metrics.close()
        self._routing.close()


class PluginTracker:
    """A tracker of a user's: after its first error it is left out, with a warning, and the run continues."""

    def __init__(self, kind: str, build: Callable[[], Tracker], *, warn: Callable[[str], None]) -> None:
        """Make the tracker.

        Args:
            kind: its name in messages.
            build: makes it.
            warn: called with the one warning.
        """
        self._kind, self._warn = kind, warn
        self._tracker: Tracker | None = None
        with self._dropping_on_error():
            self._tracker = build()

    def log(self, record: Logged, experts: Logged | None = None) -> None:
        """Keep a record."""
        with self._dropping_on_error():
            if self._tracker is not None:
                self._tracker.log(record, experts)

    def written(self) -> list[tuple[str, str]]:
        """Return what it keeps and where; nothing after an error."""
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
            self._warn(f"metrics.trackers: {self._kind}: {type(error).__name__}: {error}; going on without it")


class Trackers:
    """All of a run's trackers as one; on ranks that keep nothing there are none. A context that closes them."""

    def __init__(self, trackers: Sequence[Tracker] = ()) -> None:
        self._trackers = list(trackers)
        self.exit_code = 0
        """What the run ends with unless an error ends it."""

    def add(self, trackers: Sequence[Tracker]) -> None:
        """Let others keep records as well, from now on."""
        self._trackers += trackers

    def log(self, record: Logged, experts: Logged | None = None) -> None:
        """Keep a record everywhere."""
        for tracker in self._trackers:
            tracker.log(record, experts)

    def written(self) -> list[tuple[str, str]]:
        """Return what all of them keep, and where."""
        return [place for tracker in self._trackers for place in tracker.written()]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        code = self.exit_code if error is None else exit_code_of(error) or 1
        # Where ranks are lost, or Ctrl-C was pressed again, this process has something better to do.
        is_in_haste = error is not None and (
            not isinstance(error, Exception) or isinstance(error, CommError | RemoteRankError)
        )
        while self._trackers:
            self._trackers.pop().close(code, patience_s=0.0 if is_in_haste else _LAST_CHANCE_S)
