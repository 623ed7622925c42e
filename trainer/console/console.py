"""Console output of a run: a live panel on a terminal, a plain line for each logged step anywhere else."""

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Protocol, Self, TextIO

from rich.console import Console as RichConsole
from rich.console import RenderableType
from rich.text import Text

from trainer.console import lines
from trainer.console.glyphs import QUIET
from trainer.console.live import LiveScreen
from trainer.console.plain import PlainScreen
from trainer.console.progress import BarProgress, Pace, Record, TrainingProgress
from trainer.console.safe_stream import SafeStream
from trainer.console.summary import RunSummary, SummaryScreen
from trainer.terminal import visible


class Screen(Protocol):
    """Screen interface of the console: `LiveScreen` or `PlainScreen`."""

    def line(self, text: Text, *, hanging: int = 0) -> None: ...  # noqa: D102
    def block(self, renderable: RenderableType) -> None: ...  # noqa: D102
    def show_training(self, progress: TrainingProgress, *, is_logged: bool) -> None: ...  # noqa: D102
    def show_bars(self, bars: Sequence[BarProgress]) -> None: ...  # noqa: D102
    def close(self) -> None: ...  # noqa: D102


class Console:
    """Shows a run to a person. It never raises because of the output: a closed pipe only silences it.

    Records have the keys of metrics.jsonl; a value that is None or missing is shown as a dash.

    Args:
        total_steps: Steps of the whole run; 0 where there is no training to follow.
        start_step: Completed steps at the start, when a run is resumed.
        file: Where to write; standard output by default. A terminal gets the live panel.
        width: Columns; by default the terminal's, and 80 where there is none.
        clock: Seconds that only grow.
    """

    def __init__(
        self,
        total_steps: int = 0,
        *,
        start_step: int = 0,
        file: TextIO | None = None,
        width: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        stream = SafeStream(file or sys.stdout)
        self._clock = clock
        self._pace = Pace(clock)
        self._progress = TrainingProgress(total_steps=total_steps, step=start_step)
        self._bars: list[BarProgress] = []
        self._screen = _screen(stream, width, clock)

    @property
    def is_live(self) -> bool:
        """True on a terminal that a person watches."""
        return isinstance(self._screen, LiveScreen)

    def header(self, entries: Sequence[str | tuple[str, str]]) -> None:
        """Print the first lines of a run: the first is the title, a pair is a label with its value."""
        label_width = max((len(entry[0]) for entry in entries if not isinstance(entry, str)), default=0)
        for index, entry in enumerate(entries):
            if isinstance(entry, str):
                self._screen.line(Text(visible(entry), style="bold" if index == 0 else ""))
            else:
                label, value = entry
                text = Text(f"  {label:{label_width}}  ", style=QUIET)
                self._screen.line(text.append(visible(value), style="default"), hanging=label_width + 4)

    def message(self, text: str) -> None:
        """Print a line."""
        self._screen.line(Text(visible(text)))

    def warning(self, text: str) -> None:
        """Print a line that asks for attention."""
        self._screen.line(lines.warning(text), hanging=9)

    def progress_bar(self, label: str, total_bytes: int = 0) -> "ProgressBar":
        """Show a job measured in bytes; its `update` fits where a callback (done, total, label) is asked for."""
        return ProgressBar(self, label, total_bytes)

    def tick(self, step: int) -> None:
        """Move the live progress bar to completed step `step`; cheap enough for every step, and nothing in a log."""
        self._progress.step = step
        self._screen.show_training(self._progress, is_logged=False)

    def step(self, record: Record) -> None:
        """Show a logged step. `eta_s` in the record goes before the console's own estimate."""
        progress = self._progress
        progress.step = int(record["step"] or 0)
        progress.record = record
        eta_s = self._pace.eta_s(progress.step, progress.total_steps, record.get("step_s"))
        progress.eta_s = record.get("eta_s", eta_s)
        progress.steps.append(progress.step)
        progress.losses.append(record.get("loss"))
        self._screen.show_training(progress, is_logged=True)

    def evaluation(self, record: Record) -> None:
        """Print a permanent line with the held-out numbers of an evaluation."""
        self._progress.step = int(record["step"] or 0)
        line = lines.evaluation(record, self._progress)
        self._progress.bits_per_byte = record.get("eval/bits_per_byte")
        self._screen.line(line, hanging=self._hanging)
        shares = lines.time_shares(self._progress.record)
        if shares and not self.is_live:  # the panel has them
            label = lines.step_label(self._progress.step, self._progress.total_steps)
            self._screen.line(label.append("  time  ").append_text(Text("  ").join(shares)))

    def task(self, step: int, name: str, metrics: Mapping[str, float]) -> None:
        """Print a permanent line with the numbers of an evaluation task."""
        self._progress.step = step
        self._screen.line(lines.task(step, self._progress.total_steps, name, metrics), hanging=self._hanging)

    @property
    def _hanging(self) -> int:
        """Column where a long line is continued: under its first word beyond the step."""
        return lines.step_label(0, self._progress.total_steps).cell_len + 2

    def checkpoint(self, path: str | os.PathLike[str], step: int, *, note: str = "") -> None:
        """Print a permanent line: where the checkpoint of completed step `step` lies, and what it took."""
        self._screen.line(lines.checkpoint(os.fspath(path), step, self._progress.total_steps, note))

    def summary(self, summary: RunSummary) -> None:
        """Print the last screen of a run in place of the live panel."""
        if not summary.losses:
            summary = replace(summary, steps=self._progress.steps, losses=self._progress.losses)
        self.close()
        self._screen.block(SummaryScreen(summary))

    def close(self) -> None:
        """Take the live panel away; what was printed stays. Closing twice does nothing."""
        self._bars = []
        self._screen.close()

    def _show_bar(self, bar: BarProgress) -> None:
        if not any(bar is other for other in self._bars):
            self._bars.append(bar)
        self._screen.show_bars(self._bars)

    def _end_bar(self, bar: BarProgress, *, is_complete: bool) -> None:
        self._bars = [other for other in self._bars if other is not bar]
        self._screen.show_bars(self._bars)
        if is_complete:
            self._screen.line(lines.finished_bar(bar))


class ProgressBar:
    """A job on the console, from `Console.progress_bar`; a context manager that leaves one line when it is done."""

    def __init__(self, console: Console, label: str, total_bytes: int) -> None:
        self._console = console
        self._job = label
        self._started_s = console._clock()
        self._bar = BarProgress(label=label, total_bytes=total_bytes)

    def update(self, done_bytes: int, total_bytes: int | None = None, label: str | None = None) -> None:
        """Show how much is done; the total and the label may change on the way."""
        self._bar.done_bytes = done_bytes
        if total_bytes is not None:
            self._bar.total_bytes = total_bytes
        if label is not None:
            self._bar.label = label
        self._bar.elapsed_s = self._console._clock() - self._started_s
        self._console._show_bar(self._bar)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._bar.elapsed_s:
            return  # never updated: there was nothing to do, and nothing was shown
        self._bar.label = self._job  # not of the last part only
        self._bar.elapsed_s = self._console._clock() - self._started_s
        self._console._end_bar(self._bar, is_complete=error is None)


def _screen(stream: SafeStream, width: int | None, clock: Callable[[], float]) -> Screen:
    if not stream.isatty():
        return PlainScreen(stream, width=width)
    rich = RichConsole(
        file=stream,  # type: ignore[arg-type]
        width=width,
        force_terminal=True,
        force_jupyter=False,
        markup=False,
        highlight=False,
        emoji=False,
    )
    return PlainScreen(stream, width=width) if rich.is_dumb_terminal else LiveScreen(rich, clock=clock)
