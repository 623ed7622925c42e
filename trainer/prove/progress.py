"""Show the progress of a proof on standard error; standard output is for the table."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console as RichConsole
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from trainer.console.formatting import duration
from trainer.console.safe_stream import SafeStream


class LayoutProgress:
    """Shows which layout is running: one updating line on a terminal, one line per layout elsewhere."""

    def __init__(self, total: int, *, file: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._total, self._clock, self._started_s = total, clock, clock()
        self._stream = SafeStream(file or sys.stderr)

    @contextmanager
    def running(self, name: str, number: int | None = None) -> Iterator[None]:
        """Show a layout while it runs; layouts are numbered from 1, but for the reference."""
        elapsed = duration(self._clock() - self._started_s)
        text = f"{number or 0} of {self._total}, after {elapsed}: {name}"
        text += ", the reference" if number is None else ""
        console = RichConsole(file=self._stream, markup=False, highlight=False)  # type: ignore[arg-type]
        if not self._stream.isatty() or console.is_dumb_terminal:
            self._stream.write(f"{text}\n")
            self._stream.flush()
            yield
            return
        columns = SpinnerColumn(), TimeElapsedColumn(), TextColumn("{task.description}")  # cut off at its end
        with Progress(*columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False) as shown:
            shown.add_task(text, total=None)
            yield
