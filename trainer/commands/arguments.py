"""Arguments shared by several commands."""

import argparse
import math
import os
import platform
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import NoReturn, get_args

from trainer.checkpoint.choice import CheckpointChoice, WeightsOf
from trainer.commands.shipped import as_config
from trainer.config.base import expand_home
from trainer.config.nodes import shown
from trainer.config.numbers import MAX_INT, MAX_RANKS
from trainer.distributed.version import turnout_version
from trainer.errors import ConfigError, ResourceError
from trainer.terminal import single_line

Subparsers = argparse._SubParsersAction
"""Where a command is added: to the command line, or to a command with subcommands."""

RUN = "run folder or experiment file"
BEST = "best"
"""In place of a step: that of the best checkpoint."""


class Parser(argparse.ArgumentParser):
    """Prints a usage error as one line that is safe for a terminal."""

    def error(self, message: str) -> NoReturn:
        """Exit with code 2."""
        self.exit(2, f"{single_line(f'{self.prog}: {message}')}; see {self.prog} --help\n")


def versions() -> str:
    """Return the versions to state in a bug report."""
    turnout = turnout_version() or "(not installed)"
    return f"turnout {turnout}, Python {platform.python_version()}, torch {metadata.version('torch')}"


def as_path(text: str) -> Path:
    """Return a path, with ~ expanded: shells leave it in quotes and after an equals sign."""
    return Path(expand_home(text))


def check_target(option: str, path: Path | None) -> None:
    """Refuse, before anything is measured, a file that cannot be written."""
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        problem = "is a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise ConfigError(f"{option}: {path}: {problem}; name a file in a folder that exists")
    if path is not None and not os.access(path.parent, os.W_OK):
        raise ResourceError(f"{option}: {path}: cannot be written: {path.parent} is read-only; name another file")


def ranks(text: str) -> int:
    """Parse a number of ranks."""
    number = whole(text)
    if number > MAX_RANKS:
        raise argparse.ArgumentTypeError(f"must be at most {MAX_RANKS} ranks, got {shown(text)}")
    return number


def whole(text: str, least: int = 1) -> int:
    """Parse a whole number of at least `least`."""
    if not (text.isascii() and text.isdigit() and int(text) >= least):
        raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, got {shown(text)}")
    if int(text) > MAX_INT:
        raise argparse.ArgumentTypeError(f"must be below 2^63, got {shown(text)}")
    return int(text)


def step_or_best(text: str) -> int | str:
    """Parse the step of a checkpoint, or `best`, which `resolve` replaces by its step."""
    return text if text == BEST else whole(text, least=0)


def seed(text: str) -> int:
    """Parse a seed."""
    return whole(text, least=0)


def fraction(text: str) -> float:
    """Parse a number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be a number from 0 to 1, got {shown(text)}")
    return value


def names(text: str) -> list[str]:
    """Parse names separated by commas."""
    return [name.strip() for name in text.split(",")]


def add_command(
    subparsers: Subparsers, name: str, function: Callable[[argparse.Namespace], int], *, example: str
) -> argparse.ArgumentParser:
    """Add a command; its help is the docstring of its function and an example of its arguments."""
    text = (function.__doc__ or "").strip()
    parser = subparsers.add_parser(name, help=text, description=text)
    parser.epilog = f"example: {parser.prog} {example}".rstrip()
    parser.set_defaults(command=function)
    return parser


def add_config(parser: argparse.ArgumentParser, what: str = "experiment file") -> argparse.ArgumentParser:
    """Add a config and overrides to a command's arguments."""
    parser.add_argument("config", type=as_config, metavar="CONFIG", help=f"{what}, or a name such as quickstart")
    add_overrides(parser, "train.steps=40")
    return parser


def add_run(parser: argparse.ArgumentParser, *, with_overrides: bool = True) -> argparse.ArgumentParser:
    """Add a run, named by its folder or its config, to a command's arguments."""
    what = "run folder, such as runs/smoke; or the experiment file that it was trained from"
    parser.add_argument("config", type=as_config, metavar="RUN", help=what)
    if with_overrides:
        add_overrides(parser, "parallel.device=cpu")
    return parser


def add_overrides(parser: argparse.ArgumentParser, example: str) -> None:
    """Add overrides to a command's arguments; the command line accepts them after options too."""
    parser.add_argument("overrides", nargs="*", default=[], metavar="a.b=c", help=f"keys to change, such as {example}")


def add_step(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the choice of a checkpoint to a command's options."""
    what = "use the checkpoint of this step instead of the newest, or best: that of checkpoint.best"
    parser.add_argument("--step", type=step_or_best, metavar="N", help=what)
    return parser


def add_choice(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the choice of a checkpoint's weights to a command's options."""
    what = "use the weights themselves (raw), or their moving average (ema, of train.ema)"
    add_step(parser).add_argument("--weights", choices=get_args(WeightsOf), default="raw", help=what)
    return parser


def choice_of(options: argparse.Namespace) -> CheckpointChoice:
    """Return the weights that options choose, once `--step best` is resolved."""
    return CheckpointChoice(step=options.step, weights=options.weights)
