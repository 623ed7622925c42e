"""Multiple choice: the completion with the highest log-probability."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trainer.data.records.base import Record
from trainer.data.records.template import Template
from trainer.data.tokenizers.base import Tokenizer
from trainer.evaluation.context import EvalContext
from trainer.evaluation.scoring import Question, fit_question, score
from trainer.evaluation.tasks import examples
from trainer.evaluation.tasks.base import Every, Task, TaskResult


@dataclass(frozen=True, slots=True, kw_only=True)
class _Example:
    question: Question
    is_truncated: bool
    num_bytes: Sequence[int]
    answer: int


class ChoiceTask(Task):
    """Records with choices, one of which is right."""

    def __init__(
        self,
        records: examples.TaskRecords,
        tokenizer: Tokenizer,
        *,
        seq_len: int,
        every: Every,
        prompt: str,
        choices: Sequence[str] | None,
        choices_column: str | None,
        answer: str,
        ends_document: bool,
    ) -> None:
        """Read the records; raise `DataError`, with file and record, if one is unusable. The options are a config's."""
        self.name, self.every = records.task, every
        self._has_fixed_choices = choices_column is None
        question_prompt, templates = Template(prompt), [Template(text) for text in choices or []]

        def example(row: Record) -> _Example:
            fixed = [template.render(row) for template in templates]
            texts = fixed if choices_column is None else examples.text_list(row, choices_column)
            examples.check_options(texts, where=row.where, what="choices")
            question, is_truncated = fit_question(
                examples.prompt_tokens(question_prompt, row, tokenizer),
                [examples.completion_tokens(text, tokenizer, ends_document=ends_document) for text in texts],
                seq_len=seq_len,
                where=row.where,
            )
            return _Example(
                question=question,
                is_truncated=is_truncated,
                num_bytes=[len(text.encode()) for text in texts],
                answer=examples.option_index(row.value(answer), texts, row, answer),
            )

        self._examples = records.examples(example)
        self.num_examples = len(self._examples)
        self.num_truncated = sum(example.is_truncated for example in self._examples)
        asked = ([e.question.prompt, e.question.completions, e.answer] for e in self._examples)
        self.fingerprint = examples.hash_questions(self.name, *asked)

    def evaluate(self, context: EvalContext) -> TaskResult:
        """Score every choice of every record."""
        scores = score(context, [example.question for example in self._examples])
        log_probs = [[one.log_prob for one in row] for row in scores]
        answers = [example.answer for example in self._examples]
        metrics = choice_metrics(log_probs, [example.num_bytes for example in self._examples], answers)
        if self._has_fixed_choices:
            metrics["macro_f1"] = macro_f1([best_choice(row) for row in log_probs], answers)
        num_tokens = sum(len(e.question.completions[e.answer]) for e in self._examples)
        nats = -sum(row[answer] for row, answer in zip(log_probs, answers, strict=True))
        metrics |= {"loss": nats / num_tokens, "cut_prompts": self.num_truncated}
        return TaskResult(name=self.name, metrics=metrics)


def choice_metrics(
    log_probs: Sequence[Sequence[float]], num_bytes: Sequence[Sequence[int]], answers: Sequence[int]
) -> dict[str, float]:
    """Compute accuracies from each question's log-probabilities, lengths and right choice; ties go to the first choice.

    Returns:
        acc: share of questions whose most likely choice is right.
        acc_stderr: its binomial standard error, sqrt(p (1 - p) / n).
        acc_norm: the same with log-probabilities divided by length in bytes (lm-eval's acc_bytes, and its acc_norm
            where all characters are ASCII).
    """
    is_right = [best_choice(row) == answer for row, answer in zip(log_probs, answers, strict=True)]
    per_byte = [np.asarray(row) / np.asarray(length) for row, length in zip(log_probs, num_bytes, strict=True)]
    is_right_norm = [best_choice(row) == answer for row, answer in zip(per_byte, answers, strict=True)]
    acc = float(np.mean(is_right))
    return {
        "acc": acc,
        "acc_stderr": math.sqrt(acc * (1 - acc) / len(answers)),
        "acc_norm": float(np.mean(is_right_norm)),
    }


def best_choice(values: ArrayLike) -> int:
    """Return the first index of the largest value; -1, which is never right, if any value is NaN."""
    return -1 if np.isnan(values).any() else int(np.argmax(values))


def macro_f1(chosen: Sequence[int], answers: Sequence[int]) -> float:
    """Return the mean F1 over all classes that occur among the answers or the choices made."""

    def f1(label: int) -> float:
        predicted: NDArray[np.bool_] = np.asarray(chosen) == label
        actual: NDArray[np.bool_] = np.asarray(answers) == label
        return 2 * float((predicted & actual).sum()) / float(predicted.sum() + actual.sum())

    return float(np.mean([f1(label) for label in sorted({*chosen, *answers})]))
