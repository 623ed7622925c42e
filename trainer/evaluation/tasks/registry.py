"""Options of every evaluation task, and their union, which an entry of `eval.tasks` accepts. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from trainer.config.base import PathText, Problem, repeated
from trainer.config.nodes import shown
from trainer.config.numbers import Coefficient, Count, Length
from trainer.config.plugins import KindConfig, Pluggable
from trainer.data.records.filters import FilterConfig
from trainer.data.records.registry import RecordsConfig
from trainer.data.records.template import TemplateText
from trainer.data.sources.registry import Domain
from trainer.evaluation.tasks.text_metrics import TextMetric

if TYPE_CHECKING:
    from trainer.data.tokenizers.base import Tokenizer
    from trainer.evaluation.tasks.base import Task
    from trainer.evaluation.tasks.examples import TaskRecords

Column = Annotated[str, Field(min_length=1, max_length=1000)]


class TaskConfig(KindConfig):
    """Options of all tasks: rows, each of which becomes one question."""

    name: Domain
    """Name of the task in metrics: eval/NAME/acc."""
    rows: RecordsConfig
    """Rows that the questions are made of."""
    filters: list[FilterConfig] = Field(default=[])
    """Only rows that pass all of these are used."""
    prompt: TemplateText
    """Prompt, with columns in braces. It begins a document; answers are tokenized on their own, so a space between the
    two belongs to one of them."""
    max_examples: Count | None = None
    """At most this many rows, evenly spaced. Null: all of them."""
    every: Count | Literal["end"] | None = None
    """Steps between evaluations; the last step is always evaluated. Null: whenever held-out text is. `end`: only the
    last step."""

    def build(self, tokenizer: Tokenizer, *, seq_len: int) -> Task:
        """Read the rows and make the task."""
        raise NotImplementedError

    def problems_in(self, seq_len: int) -> Iterator[Problem]:
        """Yield options that do not fit the model's sequence length."""
        yield from ()

    def records(self) -> TaskRecords:
        """Open the rows and apply the filters."""
        from trainer.evaluation.tasks.examples import TaskRecords

        accepts = [one.keeps for one in self.filters]
        return TaskRecords(task=self.name, source=self.rows.reader(), filters=accepts, max_examples=self.max_examples)

    def question_options(self) -> dict[str, Any]:
        """Return the options that the task itself takes: all but those of `records`."""
        return self.model_dump(exclude={"kind", "name", "rows", "filters", "max_examples"})


class ChoiceTaskConfig(TaskConfig):
    """Multiple choice: the most likely of a few completions (classification, questions with choices)."""

    kind: Literal["choice"] = "choice"
    choices: Annotated[list[TemplateText], Field(min_length=2)] | None = None
    """The texts, the same for every row or with columns in braces."""
    choices_column: Column | None = None
    """Column with a list of choices, where every row has its own."""
    answer: Column
    """Column with the right choice: its number, from 0, or its text (surrounding white space is ignored)."""
    ends_document: bool = True
    """Count the end of the document after a choice as part of it, as in training. False: a choice may be continued, so
    1 is at least as likely as 10."""

    def problems(self) -> Iterator[Problem]:
        """Require one source of choices, and distinct choices."""
        yield from super().problems()
        yield from _exactly_one(choices=self.choices, choices_column=self.choices_column)
        for twice in repeated(self.choices or []):
            yield Problem("choices", f"{shown(twice)} is repeated; list each choice once")

    def build(self, tokenizer: Tokenizer, *, seq_len: int) -> Task:
        """Read the rows and make the task."""
        from trainer.evaluation.tasks.choice_task import ChoiceTask

        return ChoiceTask(self.records(), tokenizer, seq_len=seq_len, **self.question_options())


class RankingTaskConfig(TaskConfig):
    """Ranking of many texts by how likely each is to follow (recommendation, retrieval)."""

    kind: Literal["ranking"] = "ranking"
    candidates_column: Column | None = None
    """Column with the list of candidates."""
    candidates_file: PathText | None = None
    """File with the candidates of every row, one per line."""
    relevant: Column
    """Column with the relevant candidates: a number, from 0, or a text, or a list of them."""
    k: Annotated[list[Count], Field(min_length=1)] = Field(default=[1, 10])
    """Cutoffs of hit@k and ndcg@k."""
    order_by: Literal["sum", "mean_per_byte"] = "sum"
    """Score that orders candidates: log-probability, or log-probability per byte."""
    ends_document: bool = True
    """Count the end of the document after a candidate as part of it, as in training."""

    def problems(self) -> Iterator[Problem]:
        """Require one source of candidates, and distinct k."""
        yield from super().problems()
        yield from _exactly_one(candidates_column=self.candidates_column, candidates_file=self.candidates_file)
        for twice in repeated(self.k):
            yield Problem("k", f"{twice} is repeated; list each k once")

    def build(self, tokenizer: Tokenizer, *, seq_len: int) -> Task:
        """Read the rows and make the task."""
        from trainer.evaluation.tasks.ranking_task import RankingTask

        return RankingTask(self.records(), tokenizer, seq_len=seq_len, **self.question_options())


class GenerationTaskConfig(TaskConfig):
    """Generated text against references (translation, summaries)."""

    kind: Literal["generation"] = "generation"
    references: Annotated[list[TemplateText], Field(min_length=1)]
    """Reference texts, one or several equally good ones."""
    metrics: Annotated[list[TextMetric], Field(min_length=1)] = Field(default=["bleu", "chrf"])
    """bleu and chrf are sacrebleu's corpus scores, 0 to 100; rouge (rouge1, rouge2, rougeL; words of a to z and digits
    only) and exact_match are means over texts of the best reference, 0 to 1."""
    bleu_tokenize: Literal["13a", "intl", "zh", "char", "none"] = "13a"
    """Tokenizer of sacrebleu: 13a for languages with spaces, zh for Chinese, char for single characters."""
    max_new_tokens: Length = 64
    """Longest text; it ends earlier where the model ends the document."""
    temperature: Coefficient = 0.0
    """0 always takes the most likely token."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Draw from the most likely tokens of this total probability."""

    def packages(self) -> Iterator[tuple[str, str]]:
        """Yield the libraries that compute the metrics."""
        if {"bleu", "chrf"} & set(self.metrics):
            yield "metrics", "sacrebleu"
        if "rouge" in self.metrics:
            yield "metrics", "rouge_score"

    def problems(self) -> Iterator[Problem]:
        """Require distinct metrics."""
        yield from super().problems()
        for twice in repeated(self.metrics):
            yield Problem("metrics", f"{twice} is repeated; list each metric once")

    def problems_in(self, seq_len: int) -> Iterator[Problem]:
        """Leave space for a prompt."""
        if self.max_new_tokens >= seq_len:
            problem = f"{self.max_new_tokens} leaves no space for a prompt in model.seq_len {seq_len}"
            yield Problem("max_new_tokens", f"{problem}; use at most {seq_len - 1}")

    def build(self, tokenizer: Tokenizer, *, seq_len: int) -> Task:
        """Read the rows and make the task."""
        from trainer.evaluation.tasks.generation_task import GenerationTask

        return GenerationTask(self.records(), tokenizer, seq_len=seq_len, **self.question_options())


AnyTaskConfig = Annotated[
    ChoiceTaskConfig | RankingTaskConfig | GenerationTaskConfig,
    Field(discriminator="kind"),
    Pluggable("tasks", TaskConfig),
]


def _exactly_one(**fields: object) -> Iterator[Problem]:
    (first, one), (second, other) = fields.items()
    if one is None and other is None:
        yield Problem("", f"needs {first} or {second}")
    elif one is not None and other is not None:
        yield Problem(second, f"is given together with {first}; use one of them")
