"""The console where a person watches: a few lines at the bottom that change, and permanent ones above."""

import time
from collections.abc import Callable, Sequence

from rich.console import Console as RichConsole
from rich.console import ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.text import Text

from trainer.console import formatting, lines
from trainer.console.glyphs import ACCENT, ALERT, QUIET, Glyphs, glyphs_for
from trainer.console.layout import packed
from trainer.console.pictures import sparkline
from trainer.console.progress import BarProgress, TrainingProgress
from trainer.terminal import visible

_REDRAW_EVERY_S = 0.1
_TREND_WIDTH = (10, 28)


class LiveScreen:
    """Redraws on the caller's thread, at most ten times a second: no thread that a fork could catch holding a lock."""

    def __init__(self, rich: RichConsole, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._rich = rich
        self._clock = clock
        self._live: Live | None = None
        self._training: TrainingProgress | None = None
        self._bars: Sequence[BarProgress] = ()
        self._drawn_s = -_REDRAW_EVERY_S

    def line(self, text: Text, *, hanging: int = 0) -> None:
        """Print a line above the changing ones; what does not fit goes on below, `hanging` columns in."""
        if 0 < hanging < self._rich.width - 10:
            rest = text[hanging:].wrap(self._rich, self._rich.width - hanging)
            text = text[:hanging].append_text(Text("\n" + " " * hanging).join(rest))
        self._rich.print(text)

    def block(self, renderable: RenderableType) -> None:
        """Print something of several lines above the changing ones."""
        self._rich.print(renderable)

    def show_training(self, progress: TrainingProgress, *, is_logged: bool) -> None:
        """Show how far training is."""
        del is_logged  # the bar moves with every step
        is_new = self._training is None
        self._training = progress
        self._draw_if_due(is_new=is_new)

    def show_bars(self, bars: Sequence[BarProgress]) -> None:
        """Show these jobs and no others."""
        is_new = len(bars) != len(self._bars)
        self._bars = tuple(bars)
        self._draw_if_due(is_new=is_new)

    def close(self) -> None:
        """Remove the changing lines and give the cursor back."""
        self._training = None
        self._bars = ()
        self._draw()

    def _draw_if_due(self, *, is_new: bool) -> None:
        if is_new or self._clock() - self._drawn_s >= _REDRAW_EVERY_S:
            self._draw()

    def _draw(self) -> None:
        self._drawn_s = self._clock()
        parts: list[RenderableType] = [BarLine(bar) for bar in self._bars]
        if self._training is not None:
            parts.append(TrainingPanel(self._training))
        if not parts:
            if self._live is not None:
                self._live.stop()
                self._live = None
            return
        if self._live is None:
            self._live = Live(console=self._rich, auto_refresh=False, transient=True)
            self._live.start()
        self._live.update(Group(Text(), *parts), refresh=True)


class TrainingPanel:
    """Progress bar over labelled values; as many columns as fit, in fixed places so that nothing jumps."""

    def __init__(self, progress: TrainingProgress) -> None:
        self._progress = progress

    def __rich_console__(self, console: RichConsole, options: ConsoleOptions) -> RenderResult:
        """Lay out for the width at hand."""
        glyphs = glyphs_for(options.encoding)
        width = options.max_width - 1
        yield self._bar(width, glyphs)
        yield from self._values(width, glyphs)
        yield from packed(lines.time_shares(self._progress.record), width, gap=2)
        if self._progress.troubles:
            yield Text(", ".join(self._progress.troubles), style=ALERT, no_wrap=True, overflow="crop")

    def _bar(self, width: int, glyphs: Glyphs) -> Text:
        progress = self._progress
        total = f"{progress.total_steps:,}"
        line = Text("step ", style=QUIET, no_wrap=True, overflow="crop")
        line.append(f"{progress.step:>{len(total)},}", style="bold default").append(f" / {total}  ")
        left = f"  {100 * progress.fraction:3.0f}%  {formatting.duration(progress.eta_s):>7} left"
        line.append_text(bar(progress.fraction, width - line.cell_len - len(left), glyphs))
        return line.append(left)

    def _values(self, width: int, glyphs: Glyphs) -> RenderResult:
        record = self._progress.record
        cells = (
            ("loss", formatting.number(record.get("loss")), 6),
            ("bits/byte", formatting.number(self._progress.bits_per_byte), 9),
            ("tokens/s", formatting.rate(record.get("tokens_per_s")), 8),
            ("imbalance", formatting.ratio(record.get("load_imbalance")), 9),
            ("dropped", formatting.percent(record.get("drop_rate")), 7),
            ("lr", formatting.learning_rate(record.get("lr")), 7),
            ("grad norm", formatting.number(record.get("grad_norm"), digits=2), 9),
        )
        gap = "  " if width < 76 else "   "
        labels = Text(no_wrap=True, overflow="crop", style=QUIET)
        values = Text(no_wrap=True, overflow="crop")
        fewest, most = _TREND_WIDTH
        for label, value, cell_width in cells:
            before = gap if labels else ""
            # The curve of the loss tells more than the last column.
            kept_free = len(gap) + fewest if label == "grad norm" else 0
            if labels.cell_len + len(before) + cell_width + kept_free > width:
                break
            style = ALERT if value.startswith(("nan", "inf", "-inf")) else "bold" if label == "loss" else ""
            labels.append(before + label.rjust(cell_width))
            values.append(before + value.rjust(cell_width), style=style)
        room = min(most, width - labels.cell_len - len(gap))
        if room >= fewest and len(self._progress.losses) > 1:
            labels.append(gap + "loss so far")
            values.append(gap + sparkline(self._progress.losses, room, glyphs=glyphs), style=ACCENT)
        yield labels
        yield values


class BarLine:
    """One job measured in bytes."""

    def __init__(self, progress: BarProgress) -> None:
        self._progress = progress

    def __rich_console__(self, console: RichConsole, options: ConsoleOptions) -> RenderResult:
        """Lay out for the width at hand."""
        progress = self._progress
        width = options.max_width - 1
        speed = "-" if progress.bytes_per_s is None else formatting.size(progress.bytes_per_s)
        done = f"  {100 * progress.fraction:3.0f}%  {formatting.size(progress.total_bytes)}  {speed + '/s':>9}"
        line = Text(visible(progress.label), no_wrap=True, overflow="crop")
        line.truncate(max(10, width - len(done) - 12))
        line.append("  ")
        line.append_text(bar(progress.fraction, width - line.cell_len - len(done), glyphs_for(options.encoding)))
        yield line.append(done, style=QUIET)


def bar(fraction: float, width: int, glyphs: Glyphs) -> Text:
    """Draw a horizontal bar of `width` characters, filled up to `fraction`."""
    width = max(0, width)
    done = round(min(1.0, max(0.0, fraction)) * width)
    return Text(glyphs.bar_done * done, style=ACCENT).append(glyphs.bar_left * (width - done), style=QUIET)
