"""The `eval` section: when and what to evaluate. Imports no torch."""

from collections.abc import Iterator

from pydantic import Field

from trainer.config.base import Config, Problem, repeated
from trainer.config.numbers import Count
from trainer.evaluation.tasks.registry import AnyTaskConfig


class EvalConfig(Config):
    """When and what to evaluate: held-out text and tasks."""

    every: Count | None = 200
    """Steps between evaluations; the last step is always evaluated. Null: only the last step."""
    max_tokens_per_domain: Count | None = 65536
    """Token budget of each domain, spent on evenly spaced rows. Null: the whole held-out text."""
    at_capacity: bool = True
    """If the model has a capacity, also evaluate with it (`eval/loss_capacity`)."""
    tasks: list[AnyTaskConfig] = Field(default=[])
    """Tasks: questions with known answers, from separate rows."""

    def problems(self) -> Iterator[Problem]:
        """Require distinct names of tasks."""
        for twice in repeated(task.name for task in self.tasks):
            yield Problem("tasks", f"two tasks have the name {twice}; give each its own `name`")
