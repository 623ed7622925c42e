"""Choosing among a few texts by how likely each is to follow a prompt."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trainer.data.records.base import Row
from trainer.data.records.template import Template
from trainer.data.tokenizers.base import Tokenizer
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
from trainer.evaluation.tasks.registry import ChoiceTaskConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class _Example:
    question: Question
    is_sharded: bool
    num_bytes: Sequence[int]
    """Bytes of each choice."""
    answer: int


class ChoiceTask(Task):
    """Rows with choices, of which one is right."""

    def __init__(self, config: ChoiceTaskConfig, tokenizer: Tokenizer, *, seq_len: int) -> None:
        """Read the rows.

        Raises:
            DataError: naming file and row, if one is unusable.
        """
        self.config = config
        self._has_fixed_choices = config.choices is not None
        prompt, choices = Template(config.prompt), [Template(text) for text in config.choices or []]

        def example(row: Row) -> _Example:
            column = config.choices_column
            texts = [choice.render(row) for choice in choices] if column is None else texts_in(row, column)
            check_options(texts, where=row.where, what="choices")
            question, is_sharded = fitted(
                prompt_tokens(prompt, row, tokenizer),
                [completion_tokens(text, tokenizer, ends_document=config.ends_document) for text in texts],
                seq_len=seq_len,
                where=row.where,
            )
            return _Example(
                question=question,
                is_sharded=is_sharded,
                num_bytes=[len(text.encode()) for text in texts],
                answer=place_of(row.value(config.answer), texts, row, config.answer),
            )

        self._examples = read_examples(config, example)
        self.num_examples = len(self._examples)
        self.num_cut = sum(example.is_sharded for example in self._examples)
        asked = ([e.question.prompt, e.question.completions, e.answer] for e in self._examples)
        self.fingerprint = fingerprint_of(config.name, *asked)

    def evaluate(self, subject: EvalContext) -> TaskResult:
        """Score every choice of every row."""
        scores = score(subject, [example.question for example in self._examples])
        log_probs = [[one.log_prob for one in row] for row in scores]
        answers = [example.answer for example in self._examples]
        metrics = choice_metrics(log_probs, [example.num_bytes for example in self._examples], answers)
        if self._has_fixed_choices:
            chosen = [likeliest(row) for row in log_probs]
            metrics["macro_f1"] = macro_f1(chosen, answers)
        num_tokens = sum(len(e.question.completions[e.answer]) for e in self._examples)
        nats = -sum(row[answer] for row, answer in zip(log_probs, answers, strict=True))
        metrics |= {"loss": nats / num_tokens, "cut_prompts": self.num_cut}
        return TaskResult(name=self.config.name, metrics=metrics)


def choice_metrics(
    log_probs: Sequence[Sequence[float]], num_bytes: Sequence[Sequence[int]], answers: Sequence[int]
) -> dict[str, float]:
    """Return accuracies; of equal choices the first one is chosen.

    Args:
        log_probs: of each choice of each row.
        num_bytes: its length.
        answers: the right choice of each row.

    Returns:
        acc: rows whose likeliest choice is right.
        acc_stderr: its binomial standard error, sqrt(p (1 - p) / n).
        acc_norm: the same where choices are compared by log-probability over their bytes (lm-eval's acc_bytes, and its
            acc_norm where all characters are ASCII).
    """
    is_right = [likeliest(row) == answer for row, answer in zip(log_probs, answers, strict=True)]
    per_byte = [np.asarray(row) / np.asarray(length) for row, length in zip(log_probs, num_bytes, strict=True)]
    is_right_norm = [likeliest(row) == answer for row, answer in zip(per_byte, answers, strict=True)]
    acc = float(np.mean(is_right))
    return {
        "acc": acc,
        "acc_stderr": math.sqrt(acc * (1 - acc) / len(answers)),
        "acc_norm": float(np.mean(is_right_norm)),
    }


def likeliest(values: ArrayLike) -> int:
    """Return the first place of the largest value; -1, which is no answer, if one is no number."""
    return -1 if np.isnan(values).any() else int(np.argmax(values))


def macro_f1(chosen: Sequence[int], answers: Sequence[int]) -> float:
    """Return the mean F1 over all classes that are the answer of some row or were chosen for one."""

    def f1(label: int) -> float:
        mine: NDArray[np.bool_] = np.asarray(chosen) == label
        right: NDArray[np.bool_] = np.asarray(answers) == label
        return 2 * float((mine & right).sum()) / float(mine.sum() + right.sum())

    return float(np.mean([f1(label) for label in sorted({*chosen, *answers})]))
