"""The last screen of a run: loss curve, held-out scores, expert map, a sample, and the paths of what was written."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rich import box
from rich.cells import cell_len, set_cell_size
from rich.console import Console, Group, RenderableType
from rich.constrain import Constrain
from rich.padding import Padding
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from trainer.console import formatting
from trainer.console.charts import loss_chart
from trainer.console.expert_map import expert_map
from trainer.console.log_lines import task_cells
from trainer.console.style import ACCENT, QUIET, packed
from trainer.terminal import visible

_CHART_HEIGHT = 9
_MAX_WIDTH = 100
_MAX_NAME = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainScore:
    """Held-out bits per byte of one domain, or of all domains together."""

    name: str
    bits_per_byte: float | None
    unigram_bits_per_byte: float | None = None
    """Bits per byte of a unigram model, the baseline that uses token frequencies alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertCounts:
    """Assignments of every MoE layer to its experts, by domain, on held-out text."""

    counts: Sequence[Sequence[Sequence[float]]]  # (layers, domains, experts)
    domains: Sequence[str]
    layer_names: Sequence[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """Content of the last screen; sections without content are left out."""

    title: str
    facts: Sequence[tuple[str, str]] = ()  # label and value, such as ("tokens", "8.2M")
    steps: Sequence[int] = ()
    losses: Sequence[float | None] = ()
    """One for each of `steps`; if both are empty, the console's own history is shown."""
    scores: Sequence[DomainScore] = ()
    eval_loss: float | None = None  # nats per target token, dropless
    eval_loss_capacity: float | None = None  # the same at the expert capacity of training
    tasks: Sequence[tuple[str, Mapping[str, float]]] = ()
    experts: ExpertCounts | None = None
    prompt: str = ""
    sample: str = ""  # generated after `prompt`
    written: Sequence[tuple[str, str]] = ()  # label and path


def summary_screen(summary: RunSummary, console: Console) -> Constrain:
    """Lay a summary out for a console, at most 100 columns wide."""
    width = min(_MAX_WIDTH, console.width) - 4
    parts: list[RenderableType] = [Text(), Rule(Text(visible(summary.title), style="bold"), align="left", style=QUIET)]
    for section in _sections(summary, width, has_bold=console.is_terminal):
        parts += [Text(), Padding(Group(*section), (0, 2))]
    return Constrain(Group(*parts), _MAX_WIDTH)


def _sections(summary: RunSummary, width: int, *, has_bold: bool) -> Iterator[Sequence[RenderableType]]:
    if summary.facts:
        facts = [Text(f"{label} ", style=QUIET).append(value, style="default") for label, value in summary.facts]
        yield [*packed(facts, width, gap=3)]
    if summary.losses:
        chart = loss_chart(summary.steps, summary.losses, width, _CHART_HEIGHT)
        yield [_heading("training loss", "nats per token"), chart]
    if summary.scores:
        yield [_heading("held out", "bits per byte, lower is better"), _scores(summary.scores)]
        if summary.eval_loss_capacity is not None:
            losses = (formatting.number(summary.eval_loss), formatting.number(summary.eval_loss_capacity))
            yield [Text("loss {} nats per token dropless, {} at the capacity of training".format(*losses), style=QUIET)]
    if summary.tasks:
        yield [_heading("tasks"), *_tasks(summary.tasks, width)]
    if summary.experts is not None:
        experts = summary.experts
        picture = expert_map(experts.counts, experts.domains, experts.layer_names, width=width)
        yield [_heading("experts by domain", "a row is a domain, a column an expert"), picture]
    if summary.sample:
        prompt = "the bold text" if has_bold else f"the first {len(summary.prompt)} characters"
        note = f"the model continues {prompt}" if summary.prompt else ""
        text = Text(visible(summary.prompt), style="bold").append(visible(summary.sample), style="not bold")
        yield [_heading("sample", note), Panel(text, box=box.ROUNDED, border_style=QUIET)]
    if summary.written:
        paths = Table.grid(padding=(0, 2, 0, 0))
        paths.add_column(style=QUIET, no_wrap=True)
        paths.add_column(overflow="fold")  # never truncated: a path is there to be copied
        for label, path in summary.written:
            paths.add_row(label, Text(visible(path)))
        yield [_heading("written to"), paths]


def _scores(scores: Sequence[DomainScore]) -> Table:
    highest = max(_finite(v) for s in scores for v in (s.bits_per_byte, s.unigram_bits_per_byte)) or 1.0
    table = Table(box=None, padding=(0, 3, 0, 0), pad_edge=False, header_style=QUIET, expand=True)
    table.add_column(max_width=_MAX_NAME)
    table.add_column("model", justify="right", style="bold", no_wrap=True)
    has_unigram = any(score.unigram_bits_per_byte is not None for score in scores)
    if has_unigram:
        table.add_column("unigram", justify="right", style=QUIET, no_wrap=True)
    table.add_column(ratio=1)
    for score in scores:
        unigram = [formatting.number(score.unigram_bits_per_byte)] if has_unigram else []
        bar = ProgressBar(total=highest, completed=_finite(score.bits_per_byte), complete_style=ACCENT, style=QUIET)
        name = Text(visible(score.name), no_wrap=True, overflow="ellipsis")
        table.add_row(name, formatting.number(score.bits_per_byte), *unigram, bar)
    return table


def _tasks(tasks: Sequence[tuple[str, Mapping[str, float]]], width: int) -> Iterator[Text]:
    name_width = min(_MAX_NAME, max(cell_len(name) for name, _ in tasks))
    for name, metrics in tasks:
        cells = [Text(f"{label} ", style=QUIET).append(value, style="bold") for label, value in task_cells(metrics)]
        label = set_cell_size(visible(name), name_width)
        for line in packed(cells, width - name_width - 3, gap=3):
            yield Text(f"{label}   ").append_text(line)
            label = " " * name_width


def _finite(value: float | None) -> float:
    return value if value is not None and math.isfinite(value) else 0.0


def _heading(name: str, note: str = "") -> Text:
    return Text(name, style="bold").append(f"  {note}" if note else "", style=f"not bold {QUIET}")
