"""Tests for evaluation reports and due tasks."""

from types import SimpleNamespace
from typing import Any

import pytest

from trainer.evaluation.eval_report import EvalReport, due_tasks
from trainer.evaluation.tasks.base import TaskResult

TASKS: Any = [SimpleNamespace(every=every) for every in (None, 4, "end")]


@pytest.mark.parametrize(
    ("done", "with_held_out", "is_last", "expected"),
    [
        (3, False, False, []),
        (4, False, False, [4]),
        (6, True, False, [None]),
        (8, True, False, [None, 4]),
        (9, True, True, [None, 4, "end"]),
    ],
)
def test_a_task_is_due_with_held_out_text_or_at_its_own_steps_and_always_at_the_end(
    done: int, with_held_out: bool, is_last: bool, expected: list[Any]
) -> None:
    due = due_tasks(TASKS, done, with_held_out=with_held_out, is_last=is_last)
    assert [task.every for task in due] == expected


def test_a_record_has_the_keys_of_every_task() -> None:
    results = [TaskResult(name="a", metrics={"acc": 0.5}), TaskResult(name="b", metrics={"hit@1": 1.0, "mrr": 1.0})]
    record = EvalReport(held_out=None, tasks=results).record()
    assert record == {"eval/a/acc": 0.5, "eval/b/hit@1": 1.0, "eval/b/mrr": 1.0}
