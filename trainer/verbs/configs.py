"""The verb config: what an experiment file says."""

import argparse
from pathlib import Path

from trainer.config.dump import diff, dump
from trainer.config.loader import load
from trainer.config.schema import schema_text
from trainer.experiment import ExperimentConfig
from trainer.verbs.arguments import Verbs, takes_config, verb
from trainer.verbs.named import named_config


def add(verbs: Verbs) -> None:
    """Add its actions with their arguments."""
    config = verbs.add_parser("config", help="Show, compare and describe experiment files.")
    actions = config.add_subparsers(required=True, metavar="ACTION")
    takes_config(verb(actions, "show", show))
    verb(actions, "schema", schema)
    sub = verb(actions, "diff", difference)
    sub.add_argument("a", type=Path)
    sub.add_argument("b", type=Path)


def show(options: argparse.Namespace) -> int:
    """Print a config with every default."""
    print(dump(named_config(options)), end="")
    return 0


def schema(options: argparse.Namespace) -> int:
    """Print the JSON schema that editors complete and check experiment files with."""
    print(schema_text(ExperimentConfig), end="")
    return 0


def difference(options: argparse.Namespace) -> int:
    """Print the keys in which two configs differ."""
    a, b = (load(path, [], ExperimentConfig) for path in (options.a, options.b))
    print("\n".join(diff(a, b)))
    return 0
