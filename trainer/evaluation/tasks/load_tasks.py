"""Build the evaluation tasks of a run, the same ones on all ranks."""

from collections.abc import Callable, Sequence

from trainer.checkpoint.compatible import abridged
from trainer.config.build_plugin import build_plugin
from trainer.data.corpus import Corpus
from trainer.distributed.collective_errors import raise_together
from trainer.distributed.collectives import Group
from trainer.distributed.consistency import differences_across_ranks
from trainer.errors import ConfigError, DataError
from trainer.evaluation.tasks.base import Task
from trainer.evaluation.tasks.registry import AnyTaskConfig


def load_tasks(
    configs: Sequence[AnyTaskConfig], corpus: Corpus, *, seq_len: int, world: Group, warn: Callable[[str], None]
) -> list[Task]:
    """Read and check the records of evaluation tasks, rank 0 first; warn about truncated prompts. Collective.

    Raises:
        ConfigError: if a task has the name of a domain, whose metrics keys it would share.
        DataError: naming file and record, if one is unusable, or if ranks read different records.
    """
    for config in configs:
        if config.name in corpus.domains:
            raise ConfigError(f"eval.tasks: {config.name} is a domain of the text; give the task another name")
    tasks: list[Task] = []
    for is_my_turn in (world.index == 0, world.index > 0):  # rank 0 downloads first, the others find it in the cache
        with raise_together(world):
            if is_my_turn:
                tasks = [
                    build_plugin(config, Task, f"eval.tasks.{index}", corpus.tokenizer, seq_len=seq_len)
                    for index, config in enumerate(configs)
                ]
    fingerprints = {task.name: abridged(task.fingerprint) for task in tasks}
    if different := differences_across_ranks(world, {"eval": {"tasks": fingerprints}}):
        raise DataError(f"{different[0]}; all ranks must read the same rows (eval.tasks)")
    for task in tasks:
        if task.num_truncated:
            warn(
                f"eval.tasks: {task.name}: {task.num_truncated} of {task.num_examples} prompts do not fit "
                "model.seq_len and are truncated on the left"
            )
    return tasks
