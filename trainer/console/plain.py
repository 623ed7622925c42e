"""The console where nobody watches: a pipe, a file, a CI log. Lines of text and nothing else."""

from collections.abc import Sequence

from rich.console import Console as RichConsole
from rich.console import RenderableType
from rich.text import Text

from trainer.console import lines
from trainer.console.progress import BarProgress, TrainingProgress
from trainer.console.safe_stream import SafeStream

_BAR_EVERY_S = 10.0


class PlainScreen:
    """Writes one line for each logged step; a line is never wrapped, so that it can be searched for."""

    def __init__(self, stream: SafeStream, *, width: int | None) -> None:
        self._stream = stream
        # Said in so many words, because rich would obey FORCE_COLOR, which CI systems set.
        self._rich = RichConsole(
            file=stream,  # type: ignore[arg-type]
            width=width or 80,
            force_terminal=False,
            force_jupyter=False,
            color_system=None,
            markup=False,
            highlight=False,
            emoji=False,
        )
        self._said: tuple[BarProgress | None, float] = (None, 0.0)

    def line(self, text: Text, *, hanging: int = 0) -> None:
        """Write a line."""
        del hanging  # nothing is wrapped
        self._stream.write(text.plain + "\n")
        self._stream.flush()

    def block(self, renderable: RenderableType) -> None:
        """Write something of several lines, laid out by rich."""
        with self._rich.capture() as captured:
            self._rich.print(renderable)
        # rich fills lines up to its width, which a log does not need.
        self._stream.write("".join(f"{line.rstrip()}\n" for line in captured.get().splitlines()))
        self._stream.flush()

    def show_training(self, progress: TrainingProgress, *, is_logged: bool) -> None:
        """Write the logged step; what happens between logged steps is not written."""
        if is_logged:
            self.line(lines.logged_step(progress))

    def show_bars(self, bars: Sequence[BarProgress]) -> None:
        """Write how far the newest job is, now and then."""
        if not bars:
            return
        bar = bars[-1]
        said, said_at_s = self._said
        if bar.elapsed_s - (said_at_s if said is bar else 0.0) >= _BAR_EVERY_S:
            self._said = (bar, bar.elapsed_s)
            self.line(lines.running_bar(bar))

    def close(self) -> None:
        """Nothing stays open."""
