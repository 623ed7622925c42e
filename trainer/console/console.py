"""Console output of a run: a live panel on a terminal, one plain line per logged step anywhere else."""

import os
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Final, TextIO

from rich.console import Console as RichConsole
from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from trainer.console import formatting, log_lines
from trainer.console.safe_stream import SafeStream
from trainer.console.style import QUIET
from trainer.console.summary import RunSummary, summary_screen
from trainer.console.training_panel import bar_line, training_panel
from trainer.console.training_progress import Record, TrainingProgress
from trainer.terminal import visible

_REDRAW_EVERY_S: Final = 0.1
_LOG_JOB_EVERY_S: Final = 10.0
_LOG_WIDTH: Final = 80
_NO_CURSOR: Final = ("dumb", "unknown")  # values of TERM, as rich knows them


class Console:
    """Shows a run to a person. Output errors never raise: a closed pipe only silences it.

    Records have the keys of metrics.jsonl; a value that is None or missing is shown as a dash. A terminal gets the live
    panel, redrawn on the caller's thread, so that no thread of its own holds a lock when the process forks. Anything
    else gets plain lines that are never wrapped, so that they can be searched. The width is by default the terminal's,
    and 80 columns elsewhere.
    """

    def __init__(
        self,
        total_steps: int = 0,
        *,
        file: TextIO | None = None,
        width: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream, self._clock = SafeStream(file or sys.stdout), clock
        self._progress = TrainingProgress(total_steps=total_steps)
        self._is_training = False
        self._jobs: list[ProgressBar] = []
        self.is_live = self._stream.isatty() and os.environ.get("TERM", "").lower() not in _NO_CURSOR
        """True on a terminal that can move its cursor."""
        self._rich = RichConsole(  # all of it is explicit, because rich would obey FORCE_COLOR, which CI systems set
            file=self._stream,  # type: ignore[arg-type]
            width=width if self.is_live else width or _LOG_WIDTH,
            force_terminal=self.is_live,
            force_jupyter=False,
            color_system="auto" if self.is_live else None,
            markup=False,
            highlight=False,
            emoji=False,
        )
        self._live: Live | None = None
        self._drawn_s = -_REDRAW_EVERY_S

    def header(self, entries: Sequence[str | tuple[str, str]]) -> None:
        """Print the first lines of a run: the first is the title, a pair is a label with its value."""
        label_width = max((len(entry[0]) for entry in entries if not isinstance(entry, str)), default=0)
        for index, entry in enumerate(entries):
            if isinstance(entry, str):
                self._print(Text(visible(entry), style="bold" if index == 0 else ""))
            else:
                label, value = entry
                text = Text(f"  {label:{label_width}}  ", style=QUIET)
                self._print(text.append(visible(value), style="default"))

    def message(self, text: str) -> None:
        """Print a line."""
        self._print(Text(visible(text)))

    def warning(self, text: str) -> None:
        """Print a line that asks for attention."""
        self._print(log_lines.warning(text))

    @contextmanager
    def progress_bar(self, label: str, total_bytes: int = 0) -> "Generator[ProgressBar]":
        """Show a job measured in bytes, which leaves one line on success; a job that is never updated shows nothing."""
        bar, is_complete = ProgressBar(self, visible(label), total_bytes), False
        try:
            yield bar
            is_complete = True
        finally:
            if bar in self._jobs:
                self._jobs.remove(bar)
                self._redraw()
                if is_complete:
                    took_s = self._clock() - bar.started_s
                    took = f"{took_s:.1f}s" if took_s < 10 else formatting.duration(took_s)
                    line = Text(visible(label)).append(f"  {formatting.size(bar.done_bytes)} in {took}", style=QUIET)
                    self._print(line)

    def tick(self, step: int) -> None:
        """Move the live progress bar to completed step `step`; cheap enough for every step, and silent in a log."""
        self._progress.step = step
        self._show_training()

    def step(self, record: Record) -> None:
        """Show a logged step."""
        self._progress.add(record, now_s=self._clock())
        self._show_training()
        if not self.is_live:
            self._print(log_lines.logged_step(self._progress))

    def evaluation(self, record: Record) -> None:
        """Print a permanent line with the held-out numbers of an evaluation."""
        self._progress.step = int(record["step"] or 0)
        line = log_lines.evaluation(record, self._progress)
        self._progress.bits_per_byte = record.get("eval/bits_per_byte")
        self._print(line)
        shares = log_lines.time_shares(self._progress.record)
        if shares and not self.is_live:  # the live panel shows them
            label = log_lines.step_label(self._progress.step, self._progress.total_steps)
            self._print(label.append("  time  ").append_text(Text("  ").join(shares)))

    def task(self, step: int, name: str, metrics: Mapping[str, float]) -> None:
        """Print a permanent line with the numbers of an evaluation task."""
        self._progress.step = step
        self._print(log_lines.task(step, self._progress.total_steps, name, metrics))

    def checkpoint(self, path: str | os.PathLike[str], step: int, *, note: str = "") -> None:
        """Print a permanent line: the path of the checkpoint at completed step `step`, and a note."""
        self._print(log_lines.checkpoint(os.fspath(path), step, self._progress.total_steps, note))

    def summary(self, summary: RunSummary) -> None:
        """Print the last screen of a run in place of the live panel."""
        if not summary.losses:
            summary = replace(summary, steps=self._progress.steps, losses=self._progress.losses)
        self.close()
        with self._rich.capture() as captured:
            self._rich.print(summary_screen(summary, self._rich))
        # Rich pads lines to its full width, which a log does not need.
        self._stream.write("".join(f"{line.rstrip()}\n" for line in captured.get().splitlines()))
        self._stream.flush()

    def close(self) -> None:
        """Remove the live panel and give the cursor back; what was printed stays. Closing twice does nothing."""
        self._jobs, self._is_training = [], False
        self._redraw()

    def _print(self, text: Text) -> None:
        if self.is_live:
            self._rich.print(text)
        else:
            self._stream.write(text.plain + "\n")
            self._stream.flush()

    def _show_training(self) -> None:
        is_new, self._is_training = not self._is_training, True
        self._redraw(is_due=is_new)

    def _show_job(self, job: "ProgressBar") -> None:
        is_new = job not in self._jobs
        if is_new:
            self._jobs.append(job)
        self._redraw(is_due=is_new)
        if not self.is_live and job.elapsed_s - job.logged_s >= _LOG_JOB_EVERY_S:
            job.logged_s = job.elapsed_s
            self._print(Text(f"{job.label}  {100 * job.fraction:.0f}% of {formatting.size(job.total_bytes)}"))

    def _redraw(self, *, is_due: bool = True) -> None:
        if not self.is_live or (not is_due and self._clock() - self._drawn_s < _REDRAW_EVERY_S):
            return
        self._drawn_s = self._clock()
        if self._jobs or self._is_training:
            if self._live is None:
                self._live = Live(self, console=self._rich, auto_refresh=False, transient=True)
                self._live.start()
            self._live.refresh()
        elif self._live is not None:
            self._live.stop()
            self._live = None

    def __rich__(self) -> Group:  # the live panel, drawn anew below every permanent line
        panels = [training_panel(self._progress, self._rich.width)] if self._is_training else []
        return Group(Text(), *(job.line() for job in self._jobs), *panels)


class ProgressBar:
    """A job on the console, from `Console.progress_bar`."""

    def __init__(self, console: Console, label: str, total_bytes: int) -> None:
        self._console, self.started_s = console, console._clock()
        self.label, self.total_bytes, self.done_bytes = label, total_bytes, 0
        self.elapsed_s = self.logged_s = 0.0

    @property
    def fraction(self) -> float:
        """Fraction of all bytes that is done, 0 to 1."""
        return min(1.0, self.done_bytes / self.total_bytes) if self.total_bytes > 0 else 0.0

    def update(self, done_bytes: int, total_bytes: int | None = None, label: str | None = None) -> None:
        """Show how much is done; the total and the label may change on the way."""
        self.done_bytes = done_bytes
        self.total_bytes = self.total_bytes if total_bytes is None else total_bytes
        self.label = self.label if label is None else visible(label)
        self.elapsed_s = self._console._clock() - self.started_s
        self._console._show_job(self)

    def line(self) -> RenderableType:
        """Return the bar as a line of the live panel."""
        speed = f"{formatting.size(self.done_bytes / self.elapsed_s)}/s" if self.elapsed_s > 0 else "-"
        status = f"{100 * self.fraction:3.0f}%  {formatting.size(self.total_bytes)}  {speed:>9}"
        return bar_line(Text(self.label), self.fraction, Text(status, style=QUIET))
