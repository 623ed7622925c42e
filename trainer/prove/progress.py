"""Progress of a proof on standard error: standard output is the table, for people and programs."""

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
    """Says what runs and for how long: in a line that changes on a terminal, and in a line each anywhere else.

    Args:
        total: layouts that will come.
        file: where to write; standard error by default.
        clock: seconds that only grow.
    """

    def __init__(self, total: int, *, file: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._total, self._clock, self._started_s = total, clock, clock()
        self._stream = SafeStream(file or sys.stderr)

    @contextmanager
    def running(self, name: str, number: int | None = None) -> Iterator[None]:
        """Show a layout for as long as it runs.

        Args:
            name: of the layout.
            number: its place, from 1; None for what the others are compared with.
        """
        elapsed = duration(self._clock() - self._started_s)
        text = f"{number or 0} of {self._total}, after {elapsed}: {name}"
        text += ", which the others are compared with" if number is None else ""
        console = RichConsole(file=self._stream, markup=False, highlight=False)  # type: ignore[arg-type]
        if not self._stream.isatty() or console.is_dumb_terminal:
            self._stream.write(f"{text}\n")
            self._stream.flush()
            yield
            return
        # Nothing else is printed while it is there, and it leaves nothing behind.
        columns = SpinnerColumn(), TimeElapsedColumn(), TextColumn("{task.description}")  # cut off at its end
        with Progress(*columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False) as shown:
            shown.add_task(text, total=None)
            yield
