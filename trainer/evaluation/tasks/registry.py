"""Every evaluation task's options, and the union of them that an entry of `eval.tasks` accepts. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from trainer.config.base import PathText, Problem, repeated
from trainer.config.nodes import shown
from trainer.config.numbers import Coefficient, Count, Length
from trainer.config.plugins import KindConfig, Pluggable
from trainer.data.records.filters import FilterConfig
from trainer.data.records.registry import RowsConfig
from trainer.data.records.template import TemplateText
from trainer.data.sources.registry import Domain

if TYPE_CHECKING:
    from trainer.data.tokenizers.base import Tokenizer
    from trainer.evaluation.tasks.base import Task

Column = Annotated[str, Field(min_length=1, max_length=1000)]


class TaskConfig(KindConfig):
    """Options of all tasks: rows, each of which becomes one question."""

    name: Domain
    """Name of the task in metrics: eval/NAME/acc."""
    rows: RowsConfig
    """Rows that the questions are made of."""
    filters: list[FilterConfig] = Field(default=[])
    """Rows that do not pass all of these are left out."""
    prompt: TemplateText
    """Prompt, with columns in braces. It begins a document; answers are tokens of their own, so a space
    between the two belongs to one of them."""
    max_examples: Count | None = None
    """Evenly spaced rows, this many at the most. Null: all of them."""
    every: Count | Literal["end"] | None = None
    """Steps between evaluations; there is one at the end as well. Null: whenever held-out text is evaluated. `end`:
    only at the end."""

    def problems_in(self, seq_len: int) -> Iterator[Problem]:
        """Yield what does not fit rows of so many tokens."""
        yield from ()


class ChoiceTaskConfig(TaskConfig):
    """Multiple choice: the likeliest of a few completions (classification, questions with choices)."""

    kind: Literal["choice"] = "choice"
    choices: Annotated[list[TemplateText], Field(min_length=2)] | None = None
    """The texts, the same for every row or with columns in braces."""
    choices_column: Column | None = None
    """Column with the list of them, where every row has its own."""
    answer: Column
    """Column with the right one: its number, from 0, or its text (white space around it does not count)."""
    ends_document: bool = True
    """The end of the document after a choice counts as part of it, as it does in training. False: a choice may go on,
    so that 1 is at least as likely as 10."""

    def problems(self) -> Iterator[Problem]:
        """Ask for one source of choices, and for choices that differ."""
        yield from super().problems()
        yield from _exactly_one(choices=self.choices, choices_column=self.choices_column)
        for twice in repeated(self.choices or []):
            yield Problem("choices", f"{shown(twice)} is there twice; each choice once")

    def build(self, tokenizer: Tokenizer, *, seq_len: int) -> Task:
        """Read the rows and make the task."""
        from trainer.evaluation.tasks.choice import ChoiceTask

        return ChoiceTask(self, tokenizer, seq_len=seq_len)


class RankingTaskConfig(TaskConfig):
    """Ranking of many texts by how likely each is to follow (recommendation, retrieval)."""

    kind: Literal["ranking"] = "ranking"
    candidates_column: Column | None = None
    """Column with the list of candidates."""
    candidates_file: PathText | None = None
    """File with the candidates of every row, one a line."""
    relevant: Column
    """Column with the right ones: a number, from 0, or a text, or a list of them."""
    k: Annotated[list[Count], Field(min_length=1)] = Field(default=[1, 10])
    """Lengths of the top of the list, for hit@k and ndcg@k."""
    order_by: Literal["sum", "mean_per_byte"] = "sum"
    """Score that orders candidates: log-probability, or that over their length in bytes."""
    ends_document: bool = True
    """The end of the document after a candidate counts as part of it, as it does in training."""

    def problems(self) -> Iterator[Problem]:
        """Ask for one source of candidates, and for each k once."""
        yield from super().problems()
        yield from _exactly_one(candidates_column=self.candidates_column, candidates_file=self.candidates_file)
        for twice in repeated(self.k):
            yield Problem("k", f"{twice} is there twice; each k once")

    def build(self, tokenizer: Tokenizer, *, seq_len: int) -> Task:
        """Read the rows and make the task."""
        from trainer.evaluation.tasks.ranking import RankingTask

        return RankingTask(self, tokenizer, seq_len=seq_len)


TextMetric = Literal["bleu", "chrf", "rouge", "exact_match"]


class GenerationTaskConfig(TaskConfig):
    """Generated text against references (translation, summaries)."""

    kind: Literal["generation"] = "generation"
    references: Annotated[list[TemplateText], Field(min_length=1)]
    """Reference texts, one or several that are equally good."""
    metrics: Annotated[list[TextMetric], Field(min_length=1)] = Field(default=["bleu", "chrf"])
    """bleu and chrf are sacrebleu's, of all texts together, 0 to 100; rouge (rouge1, rouge2, rougeL; words of a to z
    and digits only) and exact_match are means over texts of the best reference, 0 to 1."""
    bleu_tokenize: Literal["13a", "intl", "zh", "char", "none"] = "13a"
    """Tokenizer of sacrebleu: 13a for languages with spaces, zh for Chinese, char for single characters."""
    max_new_tokens: Length = 64
    """Longest text; it ends before where the model ends the document."""
    temperature: Coefficient = 0.0
    """0 always takes the likeliest token."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Draw from the likeliest tokens of this total mass."""

    def packages(self) -> Iterator[tuple[str, str]]:
        """Yield the libraries that compute the metrics."""
        if {"bleu", "chrf"} & set(self.metrics):
            yield "metrics", "sacrebleu"
        if "rouge" in self.metrics:
            yield "metrics", "rouge_score"

    def problems(self) -> Iterator[Problem]:
        """Refuse a metric that is named twice."""
        yield from super().problems()
        for twice in repeated(self.metrics):
            yield Problem("metrics", f"{twice} is there twice; name each once")

    def problems_in(self, seq_len: int) -> Iterator[Problem]:
        """Leave room for a prompt."""
        if self.max_new_tokens >= seq_len:
            yield Problem(
                "max_new_tokens",
                f"{self.max_new_tokens} leaves no room for a prompt in model.seq_len {seq_len}; use at most "
                f"{seq_len - 1}",
            )

    def build(self, tokenizer: Tokenizer, *, seq_len: int) -> Task:
        """Read the rows and make the task."""
        from trainer.evaluation.tasks.generation import GenerationTask

        return GenerationTask(self, tokenizer, seq_len=seq_len)


AnyTaskConfig = Annotated[
    ChoiceTaskConfig | RankingTaskConfig | GenerationTaskConfig,
    Field(discriminator="kind"),
    Pluggable("tasks", TaskConfig),
]


def _exactly_one(**fields: object) -> Iterator[Problem]:
    first, second = fields
    given = [name for name, value in fields.items() if value is not None]
    if not given:
        yield Problem("", f"needs {first} or {second}")
    elif len(given) > 1:
        yield Problem(second, f"is given beside {first}; use one of them")
