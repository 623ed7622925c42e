"""The command `doctor`: look for known failures of the field in a config, a step, a run, a machine, a cluster."""

import argparse
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.commands.arguments import Subparsers, add_command, add_overrides, as_path, check_target, ranks
from trainer.commands.resolve import existing_run, load_named_config, suggest_prepare
from trainer.commands.shipped import as_config
from trainer.config.check_packages import check_packages
from trainer.distributed.rank_layout import Degrees, Layout, is_first_rank, layout_from_environment
from trainer.doctor.diagnosis import Diagnosis
from trainer.doctor.host_facts import read_host
from trainer.doctor.static.config_on_host import ConfigOnHost
from trainer.doctor.static.registry import STATIC_CHECKS
from trainer.environment import check_rank_variables, world_size_and_rank
from trainer.errors import ConfigError
from trainer.experiment import ExperimentConfig
from trainer.terminal import print_safe

if TYPE_CHECKING:
    from trainer.doctor.step.diagnose_step import Scale


def add(subparsers: Subparsers) -> None:
    """Add the command with its arguments."""
    example = "configs/moe_1b.yaml parallel.device=cuda --world-size 64 --ranks-per-node 8 --static"
    sub = add_command(subparsers, "doctor", doctor_command, example=example)
    what = "experiment file, a name such as quickstart, or run folder; --cluster needs none"
    sub.add_argument("config", type=as_config, metavar="CONFIG", nargs="?", help=what)
    add_overrides(sub, "parallel.device=cuda")
    sub.add_argument("--static", action="store_true", help="take no step and read no checkpoint: half a second")
    what = "small: shrink the step's model first (auto: if it is too large for this machine)"
    sub.add_argument("--scale", choices=["auto", "full", "small"], default="auto", help=what)
    sub.add_argument("--world-size", type=ranks, metavar="N", help="ranks to train on (WORLD_SIZE, else 1)")
    sub.add_argument("--ranks-per-node", type=ranks, metavar="N", help="ranks of a machine (all, if it is not given)")
    sub.add_argument("--cluster", action="store_true", help="measure ranks, links, dispatchers; by torchrun")
    sub.add_argument("--links", type=as_path, metavar="FILE", help="with --cluster: write what `plan --links` reads")
    sub.add_argument("--json", action="store_true", help="print one JSON object")


def doctor_command(options: argparse.Namespace) -> int:
    """Look for known failures in a config, a real step, a run and this machine; exit code 1 if one is severe."""
    check_rank_variables()
    if options.links is not None and not options.cluster:
        raise ConfigError("--links: is written by --cluster; add it")
    started = options.world_size or world_size_and_rank()[0]
    if (options.ranks_per_node or 1) > started:
        raise ConfigError(f"--ranks-per-node: {options.ranks_per_node} of {started} ranks; give --world-size too")
    if options.cluster:
        return _cluster(options)
    if options.config is None:
        raise ConfigError("doctor: name a config or a run folder, or use --cluster")
    if not options.config.is_dir():
        config, diagnosis = load_named_config(options), Diagnosis()
    else:
        config, folder = existing_run(options)

        from trainer.doctor.recorded.diagnose_run import diagnose_run

        diagnosis = diagnose_run(folder.path, verifies=not options.static)
    host = read_host(
        Path(config.runs_dir), os.environ, world_size=options.world_size, ranks_here=options.ranks_per_node
    )
    diagnosis += Diagnosis.of(STATIC_CHECKS, ConfigOnHost(config=config, host=host))
    if not options.static:
        diagnosis += _step(config, options.scale)
    _show(options, diagnosis)
    return diagnosis.exit_code


def _step(config: ExperimentConfig, scale: "Scale") -> Diagnosis:
    """Return what is found in one real step, on the ranks of the launcher."""
    check_packages(config)
    layout = Layout()  # a process alone takes the step of one rank, whatever the config's layout is
    if world_size_and_rank()[0] > 1:
        layout = layout_from_environment(config.parallel.degrees)

    from trainer.doctor.step.diagnose_step import diagnose_step

    with suggest_prepare(config):
        return diagnose_step(config, layout, scale=scale)


def _cluster(options: argparse.Namespace) -> int:
    """Measure the cluster, and with a config its dispatcher beside all others."""
    if is_first_rank():
        check_target("--links", options.links)
    config = None if options.config is None else load_named_config(options)
    degrees, device = (Degrees(), "auto") if config is None else (config.parallel.degrees, config.parallel.device)
    layout = layout_from_environment(degrees if world_size_and_rank()[0] > 1 else Degrees())

    from trainer.doctor.cluster.diagnose_cluster import diagnose_cluster

    measured, diagnosis = diagnose_cluster(device, layout, links=options.links, config=config)
    _show(options, diagnosis, lines=[*measured.lines(), ""], more={"cluster": measured.record()})
    return diagnosis.exit_code


def _show(
    options: argparse.Namespace,
    diagnosis: Diagnosis,
    *,
    lines: Iterable[str] = (),
    more: dict[str, Any] | None = None,
) -> None:
    """Print what was found, on rank 0."""
    if not is_first_rank():
        return
    if options.json:
        print(json.dumps({**diagnosis.record(), **(more or {})}))
        return
    for line in (*lines, *diagnosis.lines()):
        print_safe(line, file=sys.stdout)
