"""Evaluation task interface: questions, and the score of the answers."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.evaluation.context import EvalContext
from trainer.evaluation.tasks.registry import TaskConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskResult:
    """Metrics of a model on a task."""

    name: str
    metrics: Mapping[str, float]
    """Metrics by their names in metrics.jsonl, without eval/NAME/."""
    predictions: Sequence[Mapping[str, Any]] = ()
    """Generated text of each question, in JSON values; empty where nothing is generated."""

    def record(self) -> dict[str, float]:
        """Return the keys of metrics.jsonl."""
        return {f"eval/{self.name}/{key}": value for key, value in self.metrics.items()}


class Task(ABC):
    """Questions that were read and checked, in tokens."""

    config: TaskConfig
    num_examples: int
    num_cut: int
    """Questions whose prompt was too long for a row of the model: only its end is read."""
    fingerprint: str
    """Hash of all questions: equal exactly if the same is asked, wherever the rows are."""
    signatures: Mapping[str, str] = {}
    """Signatures that make metrics comparable with others', by the name of the metric."""

    @abstractmethod
    def evaluate(self, subject: EvalContext) -> TaskResult:
        """Ask, and judge the answers; the same on every rank. Every rank must call it."""
