"""Local processes that train one layout together."""

import multiprocessing
import pickle
import tempfile
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch
import torch.distributed as dist

from trainer.distributed.journal import Journal
from trainer.distributed.layout import Layout
from trainer.distributed.mesh import Mesh, build_mesh
from trainer.errors import CommError, TurnoutError
from trainer.experiment import ExperimentConfig
from trainer.prove.cases import Case, as_config
from trainer.prove.evidence import Evidence, collect


def run_case(
    config: ExperimentConfig,
    case: Case,
    *,
    steps: int,
    timeout_s: float,
    prepare: Callable[[], None] | None = None,
) -> Evidence:
    """Train some steps of a config under a layout, in this process or in several new ones.

    Args:
        config: the user's.
        case: the layout.
        steps: optimizer steps.
        timeout_s: how long ranks wait for each other.
        prepare: called first on each of several ranks; a function of a module. Tests plant faults with it.

    Raises:
        TurnoutError: what a rank could not do, or `CommError` naming the ranks that did not come back in time.
    """
    config = as_config(config, case)
    if case.world_size == 1:
        return collect(config, Mesh.of_one(), steps=steps)
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        workers = []
        for rank in range(case.world_size):
            here, there = context.Pipe(duplex=False)
            arguments = (config, case, rank, steps, str(Path(folder) / "store"), timeout_s, prepare, there)
            process = context.Process(target=_work, args=arguments, daemon=True)
            process.start()
            there.close()
            workers.append((process, here))
        try:
            answers = _receive([pipe for _, pipe in workers], timeout_s)
        finally:
            for process, _ in workers:
                process.kill()
                process.join()
    lost = [rank for rank, answer in enumerate(answers) if answer is None]
    for rank, answer in enumerate(answers):
        if isinstance(answer, TurnoutError) and not isinstance(answer, CommError):
            raise type(answer)(f"rank {rank}: {answer}")
    errors = [f"rank {rank}: {answer}" for rank, answer in enumerate(answers) if isinstance(answer, str | CommError)]
    if errors or lost:
        silent = f"ranks {lost} never finished a step; " if lost else ""
        raise CommError(f"{case.name}: {silent}{'; '.join(errors)}")
    first = answers[0]
    assert isinstance(first, Evidence)
    return first


def _receive(pipes: list[Connection], timeout_s: float) -> list[Evidence | TurnoutError | str | None]:
    """Return each rank's answer; None for one that died, or did not come back after another one had failed.

    As long as nobody failed nobody is late: a rank that waits for a lost one gives up by itself after `timeout_s`.
    """
    answers: list[Evidence | TurnoutError | str | None] = [None] * len(pipes)
    missing = dict(enumerate(pipes))
    has_failed = False
    while missing:
        ready = wait(list(missing.values()), timeout=timeout_s + 5 if has_failed else None)
        if not ready:
            break
        for rank, pipe in list(missing.items()):
            if pipe in ready:
                del missing[rank]
                with suppress(EOFError):  # it died: no answer
                    answers[rank] = pickle.loads(pipe.recv_bytes())
                has_failed = has_failed or not isinstance(answers[rank], Evidence)
    return answers


def _work(
    config: ExperimentConfig,
    case: Case,
    rank: int,
    steps: int,
    store: str,
    timeout_s: float,
    prepare: Callable[[], None] | None,
    pipe: Connection,
) -> None:
    torch.set_num_threads(1)
    layout = Layout(world_size=case.world_size, rank=rank, ep_size=case.ep_size, ranks_per_node=case.ranks_per_node)
    try:
        if prepare is not None:
            prepare()
        dist.init_process_group(
            "gloo",
            store=dist.FileStore(store, case.world_size),
            rank=rank,
            world_size=case.world_size,
            timeout=timedelta(seconds=timeout_s),
        )
        answer: Evidence | TurnoutError | str = collect(config, build_mesh(layout, Journal()), steps=steps)
    except TurnoutError as error:
        answer = error
    except Exception as error:
        answer = "".join(traceback.format_exception_only(error)).strip()
    # Pickled by value: torch's own way lends memory of a process that is about to end.
    pipe.send_bytes(pickle.dumps(answer if rank == 0 or not isinstance(answer, Evidence) else Evidence()))
    pipe.close()
