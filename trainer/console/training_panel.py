"""The live panel at the bottom of a terminal: progress bar, current metrics and loss curve."""

from rich.console import Group
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from trainer.console import formatting, log_lines
from trainer.console.charts import sparkline
from trainer.console.style import ACCENT, ALERT, QUIET, packed
from trainer.console.training_progress import TrainingProgress

_MIN_CURVE, _MAX_CURVE = 10, 28  # width of the loss curve, in columns


def training_panel(progress: TrainingProgress, width: int) -> Group:
    """Return a progress bar over labelled values, in fixed columns so that nothing jumps: as many as fit."""
    total = f"{progress.total_steps:,}"
    step = Text("step ", style=QUIET).append(f"{progress.step:>{len(total)},}", style="bold default")
    left = f"{100 * progress.fraction:3.0f}%  {formatting.duration(progress.eta_s):>7} left"
    parts = [bar_line(step.append(f" / {total}"), progress.fraction, Text(left)), _metrics(progress, width - 1)]
    alerts = Text(", ".join(progress.alerts), style=ALERT, no_wrap=True, overflow="crop")
    shares = packed(log_lines.time_shares(progress.record), width - 1, gap=2)
    return Group(*parts, *shares, *([alerts] if alerts else []))


def _metrics(progress: TrainingProgress, free: int) -> Table:
    record, gap = progress.record, 2 if free < 76 else 3
    cells = (
        ("loss", formatting.number(record.get("loss")), 6),
        ("bits/byte", formatting.number(progress.bits_per_byte), 9),
        ("tokens/s", formatting.rate(record.get("tokens_per_s")), 8),
        ("imbalance", formatting.ratio(record.get("load_imbalance")), 9),
        ("dropped", formatting.percent(record.get("drop_rate")), 7),
        ("lr", formatting.learning_rate(record.get("lr")), 7),
        ("grad norm", formatting.number(record.get("grad_norm"), digits=2), 9),
    )
    table = Table(box=None, pad_edge=False, padding=(0, gap, 0, 0), header_style=QUIET)
    values: list[Text] = []
    for label, value, cell_width in cells:
        # The loss curve is worth more than the last column.
        reserved = _MIN_CURVE + gap if label == "grad norm" else 0
        if cell_width + reserved > free:
            break
        is_bad = value.startswith(("nan", "inf", "-inf"))
        table.add_column(label, justify="right", width=cell_width, no_wrap=True)
        values.append(Text(value, style=ALERT if is_bad else "bold" if label == "loss" else ""))
        free -= cell_width + gap
    if free >= _MIN_CURVE and len(progress.losses) > 1:
        table.add_column("loss so far", no_wrap=True)
        values.append(Text(sparkline(progress.losses, min(_MAX_CURVE, free)), style=ACCENT))
    table.add_row(*values)
    return table


def bar_line(label: Text, fraction: float, status: Text) -> Table:
    """Return one line: label, a progress bar over the remaining width, status."""
    line = Table.grid(padding=(0, 2, 0, 0), expand=True)
    line.add_column(no_wrap=True, overflow="crop")
    line.add_column(ratio=1, min_width=4)
    line.add_column(no_wrap=True)
    line.add_row(label, ProgressBar(total=1.0, completed=fraction, complete_style=ACCENT, style=QUIET), status)
    return line
