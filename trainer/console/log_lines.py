"""Permanent lines of a run: coloured on a terminal, plain in a log."""

from collections.abc import Mapping

from rich.text import Text

from trainer.console import formatting
from trainer.console.style import ALERT, GOOD, QUIET
from trainer.console.training_progress import Record, TrainingProgress
from trainer.terminal import visible


def step_label(step: int, total_steps: int) -> Text:
    """Return the start of a line: the step, aligned over the whole run."""
    width = len(f"{max(step, total_steps):,}")
    return Text("step ", style=QUIET).append(f"{step:>{width},}", style="default")


def logged_step(progress: TrainingProgress) -> Text:
    """Format a logged step as one line of a log."""
    record = progress.record
    cells = (
        ("loss", formatting.number(record.get("loss"), digits=4).rjust(6)),
        ("tokens/s", formatting.rate(record.get("tokens_per_s")).rjust(5)),
        ("eta", formatting.duration(progress.eta_s).rjust(7)),
        ("imbalance", formatting.ratio(record.get("load_imbalance")).rjust(5)),
        ("dropped", formatting.percent(record.get("drop_rate")).rjust(5)),
        ("lr", formatting.learning_rate(record.get("lr")).rjust(7)),
        ("grad norm", formatting.number(record.get("grad_norm"), digits=2).rjust(4)),
    )
    line = step_label(progress.step, progress.total_steps).append(f" / {progress.total_steps:,}")
    for label, value in cells:
        line.append(f"  {label} {value}")
    for alert in progress.alerts:
        line.append(f"  {alert}")
    return line


def time_shares(record: Record) -> list[Text]:
    """Return the share of step time of each part, in percent; empty if the record has no times."""
    seconds = {key.removeprefix("time/"): s or 0.0 for key, s in record.items() if key.startswith("time/")}
    total = sum(seconds.values()) or 1.0
    return [Text(f"{part} {100 * s / total:2.0f}%", style=QUIET) for part, s in seconds.items()]


def evaluation(record: Record, progress: TrainingProgress) -> Text:
    """Format an evaluation as one line; `progress` still holds the previous evaluation."""
    bits_per_byte = record.get("eval/bits_per_byte")
    line = step_label(progress.step, progress.total_steps)
    line.append("  held out ").append(formatting.number(bits_per_byte), style="bold default").append(" bits/byte")
    line.append_text(_change(bits_per_byte, progress.bits_per_byte))
    line.append("  loss ").append(formatting.number(record.get("eval/loss")), style="default")
    at_capacity = record.get("eval/loss_capacity")
    if at_capacity is not None:
        line.append(" (capacity ").append(formatting.number(at_capacity), style="default")
        line.append(", not causal)" if record.get("eval/capacity_looks_ahead") else ")")
    if (average := record.get("eval/ema/loss")) is not None:
        line.append("  ema ").append(formatting.number(average), style="default")
    if record.get("eval/looks_ahead"):
        line.append("  not causal", style=ALERT)
    return line


def task(step: int, total_steps: int, name: str, metrics: Mapping[str, float]) -> Text:
    """Format the numbers of an evaluation task as one line."""
    line = step_label(step, total_steps).append("  ").append(visible(name), style="bold default")
    for label, value in task_cells(metrics):
        line.append(f"  {label} ").append(value, style="default")
    return line


def task_cells(metrics: Mapping[str, float]) -> list[tuple[str, str]]:
    """Format metrics as (name, number) pairs; counts (whole numbers) that are 0 are left out."""
    return [
        (name, str(value) if isinstance(value, int) else formatting.number(value))
        for name, value in metrics.items()
        if not (isinstance(value, int) and value == 0)
    ]


def checkpoint(path: str, step: int, total_steps: int, note: str) -> Text:
    """Format the notice of a saved checkpoint."""
    line = step_label(step, total_steps).append("  saved ").append(visible(path), style="default")
    return line.append(f"  {note}", style=QUIET) if note else line


def warning(text: str) -> Text:
    """Format a warning."""
    return Text().append("warning: ", style=f"bold {ALERT}").append(visible(text))


def _change(now: float | None, previous: float | None) -> Text:
    """Format the change since the previous evaluation, blank of the same width if there is none."""
    if now is None or previous is None:
        return Text(" " * 8)
    change = round(now - previous, 3)
    return Text(f"  {change + 0.0:+.3f}", style=GOOD if change < 0 else ALERT if change > 0 else QUIET)
