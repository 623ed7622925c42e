"""Ranking: order many completions by log-probability and look at the ranks of the relevant ones."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from trainer.data.records.base import Record
from trainer.data.records.find_files import TEXT, find_files
from trainer.data.records.template import Template
from trainer.data.records.text_files import read_document
from trainer.data.tokenizers.base import Tokenizer
from trainer.errors import DataError
from trainer.evaluation.context import EvalContext
from trainer.evaluation.scoring import Question, fit_question, score
from trainer.evaluation.tasks import examples
from trainer.evaluation.tasks.base import Every, Task, TaskResult


@dataclass(frozen=True, slots=True, kw_only=True)
class _Example:
    question: Question
    is_truncated: bool
    num_bytes: Sequence[int]
    relevant: frozenset[int]


class RankingTask(Task):
    """Records with candidates, one or several of which are relevant."""

    def __init__(
        self,
        records: examples.TaskRecords,
        tokenizer: Tokenizer,
        *,
        seq_len: int,
        every: Every,
        prompt: str,
        candidates_column: str | None,
        candidates_file: str | None,
        relevant: str,
        k: Sequence[int],
        order_by: Literal["sum", "mean_per_byte"],
        ends_document: bool,
    ) -> None:
        """Read the records; raise `DataError`, with file and record, if one is unusable. The options are a config's."""
        self.name, self.every = records.task, every
        self._k, self._is_per_byte = k, order_by == "mean_per_byte"
        question_prompt = Template(prompt)

        def tokenize(texts: Sequence[str]) -> list[list[int]]:
            return [examples.completion_tokens(text, tokenizer, ends_document=ends_document) for text in texts]

        shared = [] if candidates_file is None else _read_lines(candidates_file)
        shared_tokens, shared_bytes = tokenize(shared), [len(text.encode()) for text in shared]
        for text, tokens in zip(shared, shared_tokens, strict=True):  # name the candidate, not the first record
            where = f"{candidates_file}: {text[:40]!r}"
            fit_question([tokenizer.end_of_document], [tokens], seq_len=seq_len, where=where)

        def example(row: Record) -> _Example:
            texts, tokens, num_bytes = shared, shared_tokens, shared_bytes
            if candidates_column is not None:
                texts = examples.text_list(row, candidates_column)
                examples.check_options(texts, where=row.where, what="candidates")
                tokens, num_bytes = tokenize(texts), [len(text.encode()) for text in texts]
            if max(k) > len(texts):
                raise DataError(
                    f"{row.where}: has {len(texts)} candidates, and eval.tasks: {self.name}: k has {max(k)}; "
                    "use a smaller k or more candidates"
                )
            question, is_truncated = fit_question(
                examples.prompt_tokens(question_prompt, row, tokenizer), tokens, seq_len=seq_len, where=row.where
            )
            indices = _relevant(row, relevant, texts)
            return _Example(question=question, is_truncated=is_truncated, num_bytes=num_bytes, relevant=indices)

        self._examples = records.examples(example)
        self.num_examples = len(self._examples)
        self.num_truncated = sum(example.is_truncated for example in self._examples)
        own = (
            [e.question.prompt, sorted(e.relevant), *([] if shared else e.question.completions)] for e in self._examples
        )
        self.fingerprint = examples.hash_questions(self.name, shared, *own)

    def evaluate(self, context: EvalContext) -> TaskResult:
        """Score every candidate of every record."""
        scores = score(context, [example.question for example in self._examples])
        ranks = []
        for example, row in zip(self._examples, scores, strict=True):
            values = [one.log_prob for one in row]
            if self._is_per_byte:
                values = [value / length for value, length in zip(values, example.num_bytes, strict=True)]
            ranks.append(ranks_of(values, example.relevant))
        metrics = {**ranking_metrics(ranks, self._k), "cut_prompts": self.num_truncated}
        return TaskResult(name=self.name, metrics=metrics)


def ranks_of(values: Sequence[float], relevant: frozenset[int]) -> list[int]:
    """Return the ranks of the relevant candidates, from 1, ascending, with the highest value first.

    Relevant candidates lose ties and come last among NaNs, so a model that cannot tell candidates apart gets no credit.
    """

    def key(i: int) -> tuple[float, bool]:
        return (math.inf if math.isnan(values[i]) else -values[i], i in relevant)

    order = sorted(range(len(values)), key=key)
    return [rank for rank, i in enumerate(order, start=1) if i in relevant]


def ranking_metrics(ranks: Sequence[Sequence[int]], ks: Sequence[int]) -> dict[str, float]:
    """Average over questions, each given by the ascending ranks of its relevant candidates.

    Returns:
        hit@k: a relevant candidate is among the first k.
        mrr: reciprocal rank of the first relevant candidate.
        ndcg@k: sum over relevant candidates among the first k of 1 / log2(1 + rank), over its largest possible value.
    """
    num_questions = len(ranks)
    metrics = {f"hit@{k}": sum(one[0] <= k for one in ranks) / num_questions for k in ks}
    metrics["mrr"] = sum(1 / one[0] for one in ranks) / num_questions
    return metrics | {f"ndcg@{k}": sum(_ndcg(one, k) for one in ranks) / num_questions for k in ks}


def _ndcg(ranks: Sequence[int], k: int) -> float:
    gain = sum(1 / math.log2(1 + rank) for rank in ranks if rank <= k)
    return gain / sum(1 / math.log2(1 + rank) for rank in range(1, min(k, len(ranks)) + 1))


def _relevant(row: Record, column: str, texts: Sequence[str]) -> frozenset[int]:
    value = row.value(column)
    if value == []:
        raise DataError(
            f"{row.where}: {column!r} is empty; at least one relevant candidate is needed; correct or remove the row"
        )
    values = value if isinstance(value, list) else [value]
    return frozenset(examples.option_index(one, texts, row, column) for one in values)


def _read_lines(path: str) -> list[str]:
    content = "\n".join(read_document(file) for file in find_files(path, TEXT))
    texts = [line.removesuffix("\r") for line in content.split("\n") if line.strip()]
    examples.check_options(texts, where=path, what="candidates")
    return texts
