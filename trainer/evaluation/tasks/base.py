"""Evaluation task interface: tokenized questions and the metrics of a model's answers."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from trainer.evaluation.context import EvalContext

Every = int | Literal["end"] | None
"""Steps between evaluations; "end": only after the last step; None: whenever held-out text is evaluated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskResult:
    """Metrics of a model on a task."""

    name: str
    metrics: Mapping[str, float]
    """Metrics by their names in metrics.jsonl, without eval/NAME/."""
    predictions: Sequence[Mapping[str, Any]] = ()
    """One JSON object per question, with the generated text; empty where nothing is generated."""

    def record(self) -> dict[str, float]:
        """Return the metrics under their keys in metrics.jsonl."""
        return {f"eval/{self.name}/{key}": value for key, value in self.metrics.items()}


class Task(ABC):
    """Questions that have been read, checked and tokenized."""

    name: str
    every: Every
    num_examples: int
    num_truncated: int
    """Prompts that do not fit the model's sequence length: only their end is read."""
    fingerprint: str
    """Hash of all questions, whatever files their records came from."""
    signatures: Mapping[str, str] = {}
    """How a metric was computed, by its name: values with different signatures are not comparable."""

    @abstractmethod
    def evaluate(self, context: EvalContext) -> TaskResult:
        """Score the model on every question. Collective; the result is the same on every rank."""
