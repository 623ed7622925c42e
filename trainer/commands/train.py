"""The commands `train` and `launch`."""

import argparse
import os

from trainer.checkpoint.branch import Branch
from trainer.checkpoint.run_folder import RunFolder
from trainer.commands.arguments import RUN, Subparsers, add_command, add_config
from trainer.commands.branch_run import add_branch, branch_to_train, check_branch, wait_until_made
from trainer.commands.final_page import write_final_page
from trainer.commands.init_from_parent import check_first_weights
from trainer.commands.resolve import check_run_folder, run_to_train, suggest_prepare
from trainer.distributed.liveness_pipe import start_liveness_thread
from trainer.distributed.mpi_environment import check_tasks, task_warning
from trainer.distributed.rank_layout import check_layout, layout_from_environment
from trainer.distributed.signals import StopRequest
from trainer.environment import SUPERVISOR, check_rank_variables
from trainer.errors import ConfigError
from trainer.experiment import ExperimentConfig
from trainer.parallel.expert_placement import named_placement
from trainer.status import StatusFile
from trainer.supervise.die_with_parent import end_with_launcher
from trainer.supervise.launch import Launch
from trainer.supervise.supervisor import Supervisor
from trainer.terminal import print_safe


def add(subparsers: Subparsers) -> None:
    """Add the commands with their arguments."""
    example = "configs/smoke.yaml train.steps=100 name=longer"
    sub = add_config(add_command(subparsers, "train", train_command, example=example), RUN)
    add_branch(sub)
    what = "take one fake step, without memory and data, and print what it needs"
    sub.add_argument("--dry-run", action="store_true", help=what)

    example = "configs/smoke.yaml --nproc 2 parallel.ep_size=2"
    sub = add_config(add_command(subparsers, "launch", launch_command, example=example), RUN)
    add_branch(sub)
    sub.add_argument("--nproc", metavar="N", help="ranks on this machine (NPROC, else 1)")
    sub.add_argument("--nnodes", metavar="N", help="machines; run the same command on each (NNODES, else 1)")
    what = "machines beyond these, numbered after them, that take the places of lost ones (SPARES, else 0)"
    sub.add_argument("--spares", metavar="N", help=what)
    sub.add_argument("--node-rank", metavar="N", help="number of this machine, from 0 (NODE_RANK)")
    sub.add_argument("--master-addr", metavar="A", help="address of the first machine (MASTER_ADDR)")
    sub.add_argument("--master-port", metavar="P", help="port on the first machine (MASTER_PORT, else 29500)")


def train_command(options: argparse.Namespace) -> int:
    """Train a config, or resume its run."""
    check_rank_variables()
    if options.dry_run:
        return _dry_run(options)
    is_alone = not (os.environ.get("WORLD_SIZE") or os.environ.get(SUPERVISOR))
    if is_alone:
        check_tasks(os.environ, expected=1)
    end_with_launcher()
    with StopRequest() as stop:
        config, folder, branch, warnings = _named_run(options)
        layout = layout_from_environment(config.parallel.degrees)
        if branch is not None and layout.world_size == 1:
            branch.check(folder.path)
        parent = check_first_weights(config, folder)
        if is_alone and (warning := task_warning(os.environ)) is not None:
            warnings.append(warning)
        status = StatusFile(folder.status, rank=layout.rank)
        start_liveness_thread(str(layout.rank), status if layout.world_size == 1 else None)
        with status.end_on_error():
            from trainer.training.main import train_run

            with suggest_prepare(config):
                code = train_run(
                    config,
                    folder,
                    layout,
                    warnings=warnings,
                    stop=stop,
                    status=status,
                    first_weights=None if parent is None else parent.first_weights(),
                    branch=branch,
                )
        if layout.rank == 0:
            write_final_page(config, folder, status, stop, is_finished=code == 0)
        status.end(code)
        return code


def _dry_run(options: argparse.Namespace) -> int:
    """Take one fake step as this process's rank."""
    config, _, branch, _ = _named_run(options)
    if branch is not None:
        raise ConfigError("--dry-run: a branch is made of a run, and nothing may be written; leave out --branch")
    layout = layout_from_environment(config.parallel.degrees)
    from trainer.plan.dry_run import dry_run

    return dry_run(config, layout)


def launch_command(options: argparse.Namespace) -> int:
    """Train a config on one or more ranks of this machine, and restart them after a transient failure."""
    config, folder, branch, warnings = _named_run(options)
    ranks = Launch.of(vars(options), os.environ)
    check_tasks(os.environ, expected=ranks.num_machines)
    parallel = config.parallel
    check_layout(parallel.degrees, world_size=ranks.world_size)
    check_first_weights(config, folder)
    if not ranks.spares:  # with them this machine may join a run that trains, on another machine's node
        ranks.check_port(os.environ)
        if ranks.node_rank == 0:  # the other machines' ranks start after this one's
            folder.check_free()
    arguments, timeout_s = ["train", str(options.config), *options.overrides], config.parallel.timeout_s
    if branch is not None:  # made before any rank starts, which may be started again
        if ranks.node_rank == 0:
            branch.make(folder.path)
            for warning in warnings:  # the ranks find the new run's own config
                print_safe(f"warning: {warning}")
        else:
            wait_until_made(branch, folder.path)
        arguments = ["train", str(folder.path)]
    return Supervisor(ranks, arguments, folder, patience_s=timeout_s + 30, silence_s=timeout_s).run()


def _named_run(options: argparse.Namespace) -> tuple[ExperimentConfig, RunFolder, Branch | None, list[str]]:
    """Return config and folder of the run to train, how to make it if it is a branch, and warnings."""
    check_branch(options)
    if options.branch is not None:
        return branch_to_train(options)
    config, folder = run_to_train(options)
    _check_placement(config)
    return config, folder, None, check_run_folder(folder, config)


def _check_placement(config: ExperimentConfig) -> None:
    """Raise a ConfigError if the file of a placement does not fit."""
    moe, parallel = config.model.moe, config.parallel
    if moe is not None and parallel.ep_size > 1:
        sizes = len(config.model.moe_layers), moe.num_experts, parallel.ep_size
        named_placement(parallel.placement, *sizes, num_copies=parallel.replicas)
