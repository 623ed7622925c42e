"""Reading tasks before anything is trained, the same ones on all ranks."""

from collections.abc import Callable, Sequence

from trainer.checkpoint.compatible import abridged
from trainer.data.corpus import Corpus
from trainer.distributed.collective_errors import raise_together
from trainer.distributed.collectives import Group
from trainer.distributed.consistency import differing
from trainer.errors import ConfigError, DataError
from trainer.evaluation.tasks.base import Task
from trainer.evaluation.tasks.registry import AnyTaskConfig


def read_tasks(
    configs: Sequence[AnyTaskConfig], corpus: Corpus, *, seq_len: int, world: Group, warn: Callable[[str], None]
) -> list[Task]:
    """Read and check the rows of evaluation tasks, rank 0 first; every rank must call it.

    Args:
        configs: the tasks.
        corpus: whose tokenizer reads them.
        seq_len: tokens that the model can read at once.
        world: all ranks.
        warn: is told of prompts that are cut.

    Raises:
        ConfigError: if a task has the name of a domain, with which it would share its keys in metrics.
        DataError: naming file and row, if one is unusable, or if ranks read different rows.
    """
    for config in configs:
        if config.name in corpus.domains:
            raise ConfigError(f"eval.tasks: {config.name} is a domain of the text; give the task another name")
    tasks: list[Task] = []
    for is_my_turn in (world.index == 0, world.index > 0):  # what has to be fetched is in its library's cache then
        with raise_together(world):
            if is_my_turn:
                tasks = [config.build(corpus.tokenizer, seq_len=seq_len) for config in configs]
    different = differing(world, {"eval": {"tasks": {t.config.name: abridged(t.fingerprint) for t in tasks}}})
    if different:
        raise DataError(f"{different[0]}; all ranks must read the same rows (eval.tasks)")
    for task in tasks:
        if task.num_cut:
            warn(
                f"eval.tasks: {task.config.name}: {task.num_cut} of {task.num_examples} prompts are longer than a row "
                "leaves room for (model.seq_len), and are cut on the left"
            )
    return tasks
