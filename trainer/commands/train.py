"""The verbs that train: train, launch."""

import argparse
import os

from trainer.commands.arguments import RUN, Verbs, takes_config, verb
from trainer.commands.resolve import checked, run_to_train, telling_what_makes_it
from trainer.distributed.liveness_pipe import start_liveness_thread
from trainer.distributed.mpi_environment import check_tasks, task_warning
from trainer.distributed.rank_layout import check_layout, layout_from_environment
from trainer.distributed.signals import StopRequest
from trainer.environment import SUPERVISOR, check_rank_variables
from trainer.errors import StopRequested, TurnoutError, exit_code_of
from trainer.status import StatusFile
from trainer.supervise.die_with_parent import end_with_launcher
from trainer.supervise.launch import Launch
from trainer.supervise.supervisor import Supervisor


def add(verbs: Verbs) -> None:
    """Add them with their arguments."""
    takes_config(verb(verbs, "train", train, example="configs/smoke.yaml train.steps=100 name=longer"), RUN)

    sub = takes_config(verb(verbs, "launch", launch, example="configs/smoke.yaml --nproc 2 parallel.ep_size=2"), RUN)
    sub.add_argument("--nproc", metavar="N", help="ranks on this machine (NPROC, else 1)")
    sub.add_argument("--nnodes", metavar="N", help="machines; the same command on each (NNODES, else 1)")
    sub.add_argument("--node-rank", metavar="N", help="this machine's number, from 0 (NODE_RANK)")
    sub.add_argument("--master-addr", metavar="A", help="address of the first machine (MASTER_ADDR)")
    sub.add_argument("--master-port", metavar="P", help="port there (MASTER_PORT, else 29500)")


def train(options: argparse.Namespace) -> int:
    """Train a config, or go on with its run."""
    check_rank_variables()
    if not (os.environ.get("WORLD_SIZE") or os.environ.get(SUPERVISOR)):
        check_tasks(os.environ, expected=1)
    end_with_launcher()
    with StopRequest() as stop:
        config, folder = run_to_train(options)
        layout = layout_from_environment(ep_size=config.parallel.ep_size)
        warnings = [*checked(folder, config), *_of_tasks()]
        status = StatusFile(folder.status, rank=layout.rank)
        start_liveness_thread(str(layout.rank), status if layout.world_size == 1 else None)
        try:
            from trainer.training.main import train_run

            with telling_what_makes_it(config):
                code = train_run(config, folder, layout, warnings=warnings, stop=stop, status=status)
        except BaseException as error:
            is_plain = isinstance(error, TurnoutError | StopRequested)
            code = exit_code_of(error)
            status.end(1 if code is None else code, str(error) if is_plain else f"{type(error).__name__}: {error}")
            raise
        status.end(code)
        return code


def _of_tasks() -> list[str]:
    """Return a warning where one process trains in a batch script for several."""
    is_launched = os.environ.get("WORLD_SIZE") or os.environ.get(SUPERVISOR)
    warning = None if is_launched else task_warning(os.environ)
    return [] if warning is None else [warning]


def launch(options: argparse.Namespace) -> int:
    """Train a config on one or several ranks of this machine, and start them again after a failure that may pass."""
    config, folder = run_to_train(options)
    ranks = Launch.of(vars(options), os.environ)
    check_tasks(os.environ, expected=ranks.nnodes)
    check_layout(world_size=ranks.world_size, ep_size=config.parallel.ep_size)
    checked(folder, config)
    ranks.check_port(os.environ)
    if ranks.node_rank == 0:  # the others' ranks come after its own
        folder.check_free()
    arguments, timeout_s = ["train", str(options.config), *options.overrides], config.parallel.timeout_s
    return Supervisor(ranks, arguments, folder, patience_s=timeout_s + 30, silence_s=timeout_s).run()
