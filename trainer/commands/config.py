"""The command `config`: show, compare and describe experiment files."""

import argparse
import math

from trainer.commands.arguments import Subparsers, add_command, add_config, whole
from trainer.commands.resolve import load_config_of, load_named_config
from trainer.commands.shipped import as_config
from trainer.config.dump import diff, dump
from trainer.config.nodes import shown
from trainer.config.schema import schema_text
from trainer.config.wording import choice
from trainer.errors import ConfigError
from trainer.experiment import ExperimentConfig
from trainer.lab.conventions import CONVENTIONS, RoutedModel, convert
from trainer.terminal import print_safe


def add(subparsers: Subparsers) -> None:
    """Add the subcommands with their arguments."""
    config = subparsers.add_parser("config", help="Show, compare and describe experiment files.")
    subcommands = config.add_subparsers(required=True, metavar="COMMAND")
    show = add_command(subcommands, "show", show_command, example="configs/smoke.yaml train.steps=100")
    add_config(show, "experiment file, run folder")
    add_command(subcommands, "schema", schema_command, example="")
    sub = add_command(subcommands, "diff", diff_command, example="smoke runs/smoke")
    sub.add_argument("a", type=as_config, metavar="A", help="experiment file, run folder, or a name such as quickstart")
    sub.add_argument("b", type=as_config, metavar="B", help="another one")
    example = "0.01 --from deepspeed configs/smoke.yaml"
    sub = add_command(subcommands, "coefficient", coefficient_command, example=example)
    sub.add_argument("coefficient", metavar="COEFFICIENT", help="balance-loss coefficient in the other trainer")
    names = ", ".join(CONVENTIONS)
    sub.add_argument("--from", dest="source", required=True, metavar="TRAINER", help=f"one of {names}")
    sub.add_argument("--to", dest="target", default="turnout", metavar="TRAINER", help="another one (turnout)")
    sub.add_argument("--world-size", type=whole, metavar="W", help="number of processes with experts in fastmoe")
    add_config(sub)


def show_command(options: argparse.Namespace) -> int:
    """Print a config with all defaults."""
    print(dump(load_config_of(options.config, options.overrides)), end="")
    return 0


def schema_command(options: argparse.Namespace) -> int:
    """Print the JSON schema that editors complete and check experiment files with."""
    print(schema_text(ExperimentConfig), end="")
    return 0


def diff_command(options: argparse.Namespace) -> int:
    """Print the keys that differ between two configs."""
    a, b = map(load_config_of, (options.a, options.b))
    print_safe("\n".join(diff(a, b)))
    return 0


def coefficient_command(options: argparse.Namespace) -> int:
    """Convert a balance-loss coefficient of another trainer, for the model of an experiment file."""
    coef = _number(options.coefficient)
    for option, name in (("--from", options.source), ("--to", options.target)):
        if name not in CONVENTIONS:
            raise ConfigError(f"{option}: {choice(name, list(CONVENTIONS))}")
    model = load_named_config(options).model
    if model.moe is None:
        raise ConfigError(f"{options.config}: model.moe is null, and a dense model has no balance loss")
    routed = RoutedModel(
        moe=model.moe, num_layers=model.num_layers, num_moe_layers=len(model.moe_layers), world_size=options.world_size
    )
    converted = convert(coef, source=options.source, target=options.target, model=routed)
    print_safe(f"{coef:.12g} of {options.source} is {converted.coef:.12g} of {options.target}")
    if options.target in ("turnout", "gshard_first_choice"):
        keys = ", ".join(f"{k}: {v if isinstance(v, str) else f'{v:.12g}'}" for k, v in converted.balance.items())
        counts_less = CONVENTIONS[options.source].scope == "micro_batch" and model.moe.balance.scope != "micro_batch"
        comment = f"  # add scope: micro_batch to count over what {options.source} does" if counts_less else ""
        print_safe(f"balance: {{{keys}}}{comment}")
    for warning in converted.warnings:
        print_safe(f"warning: not exact: {warning}")
    return 0


def _number(text: str) -> float:
    """Parse a coefficient."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise ConfigError(f"coefficient: must be a number of at least 0, got {shown(text)}")
    return value
