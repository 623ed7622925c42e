"""Results of one evaluation: held-out text and tasks."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.atomic_io import replace_file
from trainer.checkpoint.choice import WeightsOf
from trainer.evaluation.held_out import EvalResult
from trainer.evaluation.tasks.base import Every, Task, TaskResult


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalReport:
    """Results of one evaluation."""

    held_out: EvalResult | None
    """None: only tasks were evaluated."""
    tasks: Sequence[TaskResult]
    average: EvalResult | None = None
    """Held-out text under the moving average of the weights (`train.ema`); None: there is none."""

    def record(self) -> dict[str, float]:
        """Return the evaluation keys of metrics.jsonl."""
        record = {} if self.held_out is None else self.held_out.record()
        if self.average is not None:
            record |= {f"eval/ema/{key.removeprefix('eval/')}": value for key, value in self.average.record().items()}
        for result in self.tasks:
            record |= result.record()
        return record


def due_tasks(tasks: Sequence[Task], done: int, *, with_held_out: bool, is_last: bool) -> list[Task]:
    """Return the tasks to evaluate after `done` steps: all of them after the last step."""

    def is_due(every: Every) -> bool:
        return with_held_out if every is None else every != "end" and done % every == 0

    return [task for task in tasks if is_last or is_due(task.every)]


def write_predictions(folder: Path, result: TaskResult, *, step: int, weights: WeightsOf = "raw") -> Path | None:
    """Write the texts generated at a step, one JSON object per line; return the file, or None if there are none."""
    if not result.predictions:
        return None
    folder.mkdir(exist_ok=True)
    of_average = "" if weights == "raw" else f"-{weights}"
    path = folder / f"{result.name}-step{step}{of_average}.jsonl"
    replace_file(path, "".join(f"{json.dumps(one, ensure_ascii=False)}\n" for one in result.predictions))
    return path
