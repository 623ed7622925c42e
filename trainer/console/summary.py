"""The last screen of a run: what was learned, how well, by which experts, and where everything is."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rich import box
from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.padding import Padding
from rich.panel import Panel
from rich.rule import Rule
from rich.text import Text

from trainer.console import formatting
from trainer.console.experts_picture import expert_by_domain
from trainer.console.glyphs import ACCENT, QUIET, Glyphs, glyphs_for
from trainer.console.layout import Within, packed
from trainer.console.lines import task_cells
from trainer.console.pictures import loss_chart
from trainer.terminal import visible

_CHART_HEIGHT = 9
_MAX_WIDTH = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainScore:
    """Held-out bits per byte of one domain, or of all of them together."""

    name: str
    bits_per_byte: float | None
    unigram_bits_per_byte: float | None = None
    """Bits per byte of a unigram model, which knows token frequencies alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertCounts:
    """Assignments of every MoE layer to its experts, by domain, on held-out text."""

    counts: Sequence[Sequence[Sequence[float]]]
    """(layers, domains, experts)."""
    domains: Sequence[str]
    layer_names: Sequence[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """All that the last screen can show; what is left out is not shown."""

    title: str
    facts: Sequence[tuple[str, str]] = ()
    """Label and value, such as ("tokens", "8.2M")."""
    steps: Sequence[int] = ()
    losses: Sequence[float | None] = ()
    """One for each of `steps`; both empty: what this console has seen."""
    scores: Sequence[DomainScore] = ()
    eval_loss: float | None = None
    """Nats per target token, dropless."""
    eval_loss_capacity: float | None = None
    """Held-out loss under the capacity of training."""
    tasks: Sequence[tuple[str, Mapping[str, float]]] = ()
    """Name and numbers of each evaluation task."""
    experts: ExpertCounts | None = None
    prompt: str = ""
    sample: str = ""
    """Text that the model wrote after `prompt`."""
    written: Sequence[tuple[str, str]] = ()
    """Label and path."""


class SummaryScreen:
    """The rich renderable of a `RunSummary`."""

    def __init__(self, summary: RunSummary) -> None:
        self._summary = summary

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Lay out for the width at hand, at most 100 columns."""
        glyphs = glyphs_for(options.encoding)
        width = min(_MAX_WIDTH, options.max_width)
        yield Text()
        title = Text(visible(self._summary.title), style="bold")
        yield Within(Rule(title, align="left", style=QUIET, characters=glyphs.bar_left), width)
        for heading, body in self._sections(width - 4, glyphs, has_bold=console.is_terminal):
            yield Text()
            if heading:
                yield _indented(heading, width)
            for part in body:
                yield _indented(part, width)

    def _sections(
        self, width: int, glyphs: Glyphs, *, has_bold: bool
    ) -> Iterator[tuple[Text | None, Sequence[RenderableType]]]:
        summary = self._summary
        if summary.facts:
            facts = [Text(f"{label} ", style=QUIET).append(value, style="default") for label, value in summary.facts]
            yield None, [*packed(facts, width, gap=3)]
        if summary.losses:
            chart = loss_chart(summary.steps, summary.losses, width, _CHART_HEIGHT, glyphs=glyphs)
            yield _heading("training loss", "nats per token"), [chart]
        if summary.scores:
            yield _heading("held out", "bits per byte, lower is better"), [*self._scores(width, glyphs)]
        if summary.tasks:
            yield _heading("tasks", ""), [*self._tasks(width)]
        if summary.experts is not None:
            experts = summary.experts
            picture = expert_by_domain(experts.counts, experts.domains, experts.layer_names)
            yield _heading("experts by domain", "a row is a domain, a column an expert"), [picture]
        if summary.sample:
            prompt = "the bold text" if has_bold else f"the first {len(summary.prompt)} characters"
            note = f"the model goes on from {prompt}" if summary.prompt else ""
            yield _heading("sample", note), [self._sample()]
        if summary.written:
            yield _heading("written to", ""), [_aligned(summary.written)]

    def _scores(self, width: int, glyphs: Glyphs) -> Iterator[Text]:
        scores = self._summary.scores
        name_width = min(20, max(cell_len(score.name) for score in scores))
        has_unigram = any(score.unigram_bits_per_byte is not None for score in scores)
        header = f"{'':{name_width}}   model" + ("   unigram model" if has_unigram else "")
        yield Text(header, style=QUIET)
        highest = max(_length(v) for s in scores for v in (s.bits_per_byte, s.unigram_bits_per_byte)) or 1.0
        room = max(0, width - len(header) - 3)
        for score in scores:
            line = Text(set_cell_size(visible(score.name), name_width))
            line.append(f"{formatting.number(score.bits_per_byte):>8}", style="bold")
            if has_unigram:
                line.append(f"{formatting.number(score.unigram_bits_per_byte):>16}", style=QUIET)
            yield line.append("   ").append_text(_two_bars(score, highest, room, glyphs))
        if self._summary.eval_loss_capacity is not None:
            dropless = formatting.number(self._summary.eval_loss)
            limited = formatting.number(self._summary.eval_loss_capacity)
            yield Text(f"loss {dropless} nats per token dropless, {limited} at the capacity of training", style=QUIET)

    def _tasks(self, width: int) -> Iterator[Text]:
        name_width = min(20, max(cell_len(name) for name, _ in self._summary.tasks))
        for name, metrics in self._summary.tasks:
            cells = [Text(f"{label} ", style=QUIET).append(value, style="bold") for label, value in task_cells(metrics)]
            label = set_cell_size(visible(name), name_width)
            for line in packed(cells, width - name_width - 3, gap=3):
                yield Text(f"{label}   ").append_text(line)
                label = " " * name_width

    def _sample(self) -> Panel:
        text = Text(visible(self._summary.prompt), style="bold")
        text.append(visible(self._summary.sample), style="not bold")
        return Panel(text, box=box.ROUNDED, border_style=QUIET, padding=(0, 1))


def _two_bars(score: DomainScore, highest: float, width: int, glyphs: Glyphs) -> Text:
    """Draw the model's bar and, as its shadow, the rest up to the unigram model's."""
    done = round(_length(score.bits_per_byte) / highest * width)
    rest = round(_length(score.unigram_bits_per_byte) / highest * width) - done
    return Text(glyphs.bar_done * done, style=ACCENT).append(glyphs.bar_left * rest, style=QUIET)


def _length(value: float | None) -> float:
    """Return what a bar can show of a value: nothing of one that is missing or not finite."""
    return value if value is not None and math.isfinite(value) else 0.0


def _heading(name: str, note: str) -> Text:
    return Text(name, style="bold").append(f"  {note}" if note else "", style=f"not bold {QUIET}")


def _aligned(pairs: Sequence[tuple[str, str]]) -> Text:
    """Return label and value in two columns; a long path is folded, never cut: it is there to be copied."""
    label_width = max(len(label) for label, _ in pairs)
    text = Text(overflow="fold")
    for label, value in pairs:
        text.append("\n" if text else "").append(f"{label:{label_width}}  ", style=QUIET).append(visible(value))
    return text


def _indented(renderable: RenderableType, width: int) -> RenderableType:
    return Within(Padding(renderable, (0, 2)), width)
