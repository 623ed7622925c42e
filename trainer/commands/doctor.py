"""The command `doctor`: look for the known failures of the field in a config."""

import argparse
import json
import os
from pathlib import Path

from trainer.commands.arguments import Subparsers, add_command, add_config, whole
from trainer.commands.resolve import load_config_of
from trainer.doctor.diagnosis import Diagnosis
from trainer.doctor.host_facts import read_host
from trainer.doctor.static.config_on_host import ConfigOnHost
from trainer.doctor.static.registry import STATIC_CHECKS
from trainer.terminal import print_safe


def add(subparsers: Subparsers) -> None:
    """Add the command with its arguments."""
    example = "configs/moe_1b.yaml parallel.device=cuda --world-size 64 --ranks-per-node 8"
    sub = add_config(add_command(subparsers, "doctor", doctor_command, example=example))
    sub.add_argument("--world-size", type=whole, metavar="N", help="ranks to train on (WORLD_SIZE, else 1)")
    sub.add_argument("--ranks-per-node", type=whole, metavar="N", help="ranks of a machine (all, if it is not given)")
    sub.add_argument("--json", action="store_true", help="print one JSON object")


def doctor_command(options: argparse.Namespace) -> int:
    """Look for known failures in a config and on this machine, each with its remedy; exit code 1 if one is severe."""
    config = load_config_of(options.config, options.overrides)
    host = read_host(
        Path(config.runs_dir), os.environ, world_size=options.world_size, ranks_here=options.ranks_per_node
    )
    diagnosis = Diagnosis.of(STATIC_CHECKS, ConfigOnHost(config=config, host=host))
    if options.json:
        print(json.dumps(diagnosis.record()))
    else:
        for line in diagnosis.lines():
            print_safe(line)
    return diagnosis.exit_code
