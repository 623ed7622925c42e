"""Ordering many texts by how likely each is to follow a prompt: where are the right ones?"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from trainer.data.records.base import Row
from trainer.data.records.template import Template
from trainer.data.sources.files import read_text
from trainer.data.sources.finding import TEXT, find_files
from trainer.data.tokenizers.base import Tokenizer
from trainer.errors import DataError
from trainer.evaluation.context import EvalContext
from trainer.evaluation.scoring import Question, fitted, score
from trainer.evaluation.tasks.base import Task, TaskResult
from trainer.evaluation.tasks.examples import (
    check_options,
    completion_tokens,
    fingerprint_of,
    place_of,
    prompt_tokens,
    read_examples,
    texts_in,
)
from trainer.evaluation.tasks.registry import RankingTaskConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class _Example:
    question: Question
    is_sharded: bool
    num_bytes: Sequence[int]
    """Bytes of each candidate."""
    relevant: frozenset[int]


class RankingTask(Task):
    """Rows with candidates, of which one or several are right."""

    def __init__(self, config: RankingTaskConfig, tokenizer: Tokenizer, *, seq_len: int) -> None:
        """Read the rows.

        Raises:
            DataError: naming file and row, if one is unusable.
        """
        self.config = config
        self._k, self._is_per_byte = config.k, config.order_by == "mean_per_byte"
        prompt = Template(config.prompt)

        def tokens_of(texts: Sequence[str]) -> list[list[int]]:
            return [completion_tokens(text, tokenizer, ends_document=config.ends_document) for text in texts]

        path = config.candidates_file
        common = [] if path is None else _lines(path)
        common_tokens, common_bytes = tokens_of(common), _bytes(common)
        for text, tokens in zip(common, common_tokens, strict=True):  # of one line each, and no row's fault
            fitted([tokenizer.end_of_document], [tokens], seq_len=seq_len, where=f"{path}: {text[:40]!r}")

        def example(row: Row) -> _Example:
            texts, tokens, num_bytes = common, common_tokens, common_bytes
            if config.candidates_column is not None:
                texts = texts_in(row, config.candidates_column)
                check_options(texts, where=row.where, what="candidates")
                tokens, num_bytes = tokens_of(texts), _bytes(texts)
            if max(config.k) > len(texts):
                raise DataError(
                    f"{row.where}: has {len(texts)} candidates, and eval.tasks: {config.name}: k has {max(config.k)}; "
                    "use smaller k, or give it more"
                )
            question, is_sharded = fitted(
                prompt_tokens(prompt, row, tokenizer), tokens, seq_len=seq_len, where=row.where
            )
            relevant = _relevant(row, config.relevant, texts)
            return _Example(question=question, is_sharded=is_sharded, num_bytes=num_bytes, relevant=relevant)

        self._examples = read_examples(config, example)
        self.num_examples = len(self._examples)
        self.num_cut = sum(example.is_sharded for example in self._examples)
        own = (
            [e.question.prompt, sorted(e.relevant), *([] if common else e.question.completions)] for e in self._examples
        )
        self.fingerprint = fingerprint_of(config.name, common, *own)

    def evaluate(self, subject: EvalContext) -> TaskResult:
        """Score every candidate of every row."""
        scores = score(subject, [example.question for example in self._examples])
        ranks = []
        for example, row in zip(self._examples, scores, strict=True):
            values = [one.log_prob for one in row]
            if self._is_per_byte:
                values = [value / length for value, length in zip(values, example.num_bytes, strict=True)]
            ranks.append(ranks_of(values, example.relevant))
        metrics = {**ranking_metrics(ranks, self._k), "cut_prompts": self.num_cut}
        return TaskResult(name=self.config.name, metrics=metrics)


def ranks_of(values: Sequence[float], relevant: frozenset[int]) -> list[int]:
    """Return the places of the relevant candidates, from 1, ascending, when the highest value comes first.

    Of equal values, and of those that are no number, relevant ones come last: who tells nothing apart gets no credit.
    """

    def key(i: int) -> tuple[float, bool]:
        return (math.inf if math.isnan(values[i]) else -values[i], i in relevant)

    order = sorted(range(len(values)), key=key)
    return [place for place, i in enumerate(order, start=1) if i in relevant]


def ranking_metrics(ranks: Sequence[Sequence[int]], ks: Sequence[int]) -> dict[str, float]:
    """Return means over rows, each given by the ascending places of its relevant candidates.

    Returns:
        hit@k: a relevant one is among the first k.
        mrr: 1 over the place of the first relevant one, of all candidates.
        ndcg@k: sum over relevant ones among the first k of 1 / log2(1 + place), over what it could be at best.
    """
    num_rows = len(ranks)
    metrics = {f"hit@{k}": sum(row[0] <= k for row in ranks) / num_rows for k in ks}
    metrics["mrr"] = sum(1 / row[0] for row in ranks) / num_rows
    return metrics | {f"ndcg@{k}": sum(_ndcg(row, k) for row in ranks) / num_rows for k in ks}


def _ndcg(places: Sequence[int], k: int) -> float:
    gain = sum(1 / math.log2(1 + place) for place in places if place <= k)
    return gain / sum(1 / math.log2(1 + place) for place in range(1, min(k, len(places)) + 1))


def _relevant(row: Row, column: str, texts: Sequence[str]) -> frozenset[int]:
    value = row.value(column)
    values = value if isinstance(value, list) else [value]
    if not values:
        raise DataError(
            f"{row.where}: {column!r} is empty; one relevant candidate is needed; correct or remove the row"
        )
    return frozenset(place_of(one, texts, row, column) for one in values)


def _lines(path: str) -> list[str]:
    content = "\n".join(read_text(file) for file in find_files(path, TEXT))
    texts = [line.removesuffix("\r") for line in content.split("\n") if line.strip()]
    check_options(texts, where=path, what="candidates")
    return texts


def _bytes(texts: Sequence[str]) -> list[int]:
    return [len(text.encode()) for text in texts]
