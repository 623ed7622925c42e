"""The command `routing`: records of each token's experts. Imports no torch."""

import argparse
from pathlib import Path

from trainer.commands.arguments import RUN, Subparsers, add_command, as_path
from trainer.commands.record_option import check_new_folder
from trainer.commands.resolve import load_config_of
from trainer.commands.shipped import as_config
from trainer.errors import ConfigError
from trainer.routing_record.replay_rules import record_problem
from trainer.terminal import print_safe


def add(subparsers: Subparsers) -> None:
    """Add the subcommands with their arguments."""
    routing = subparsers.add_parser("routing", help="Verify records of each token's experts, and make them.")
    subcommands = routing.add_subparsers(required=True, metavar="COMMAND")

    sub = add_command(subcommands, "verify", verify_routing_command, example="runs/smoke/routing_record")
    sub.add_argument("record", type=as_path, metavar="RECORD", help="folder of a record")

    example = "runs/smoke rollouts.jsonl --to rollouts/1"
    sub = add_command(subcommands, "import", import_routing_command, example=example)
    sub.add_argument("config", type=as_config, metavar="RUN", help=f"{RUN} of the model that the engine ran")
    what = "what vLLM or SGLang returned, as JSON Lines (docs/routing_replay.md)"
    sub.add_argument("files", type=as_path, nargs="+", metavar="FILE", help=what)
    sub.add_argument("--to", type=as_path, required=True, metavar="RECORD", help="folder to create")


def verify_routing_command(options: argparse.Namespace) -> int:
    """Read every byte of a record and check every token's experts; exit code 3 if something is wrong."""
    from trainer.routing_record.record_reader import RoutingRecord

    record = RoutingRecord(options.record)
    for number in range(record.num_sequences):
        record.sequence(number)
    _describe(options.record, record.num_sequences, int(record.lengths().sum()))
    return 0


def import_routing_command(options: argparse.Namespace) -> int:
    """Make a record of the sequences and experts that an inference engine returned."""
    config = load_config_of(options.config)
    if (problem := record_problem(config.model.moe)) is not None:
        raise ConfigError(f"{options.config}: {problem}; name the model that the engine ran")
    check_new_folder("--to", options.to)

    from trainer.routing_record.engine_outputs import import_engine_outputs

    names = ", ".join(file.name for file in options.files)
    manifest = import_engine_outputs(options.files, options.to, config.model, made_by=names[:300])
    files = manifest.files.values()
    _describe(options.to, sum(file.num_sequences for file in files), sum(file.num_tokens for file in files))
    return 0


def _describe(folder: Path, num_sequences: int, num_tokens: int) -> None:
    print_safe(f"{folder}: {num_sequences} sequences, {num_tokens} tokens")
