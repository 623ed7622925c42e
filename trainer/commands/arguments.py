"""Arguments that the verbs share."""

import argparse
import platform
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

from trainer.commands.shipped import as_config
from trainer.config.base import at_home
from trainer.distributed.version import turnout_version
from trainer.terminal import print_safe, single_line

Verbs = argparse._SubParsersAction
"""Subparsers that a verb is added to: of the command line, or the actions of one verb."""

RUN = "run folder or experiment file"


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong, and repeats nothing that would steer a terminal."""

    def error(self, message: str) -> NoReturn:
        """Exit with code 2."""
        self.exit(2, f"{single_line(f'{self.prog}: {message}')}; see {self.prog} --help\n")


class Version(argparse.Action):
    """Prints what a report of a fault should say, and ends."""

    def __init__(self, option_strings: list[str], dest: str, help: str) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        """Print the line."""
        mine = turnout_version() or "(not installed)"
        print_safe(f"turnout {mine}, Python {platform.python_version()}, torch {metadata.version('torch')}")
        parser.exit(0)


def as_path(text: str) -> Path:
    """Return a path that was typed; no shell takes the ~ from one in quotes, or behind an equals sign."""
    return Path(at_home(text))


def verb(
    verbs: Verbs, name: str, function: Callable[[argparse.Namespace], int], *, example: str
) -> argparse.ArgumentParser:
    """Add a verb; its help is what its function says of itself, and an example of the words behind its name."""
    text = (function.__doc__ or "").strip()
    sub = verbs.add_parser(name, help=text, description=text)
    sub.epilog = f"example: {sub.prog} {example}".rstrip()
    sub.set_defaults(verb=function)
    return sub


def takes_config(sub: argparse.ArgumentParser, what: str = "experiment file") -> argparse.ArgumentParser:
    """Let a verb take a config and overrides."""
    sub.add_argument("config", type=as_config, metavar="CONFIG", help=f"{what}, or a name such as quickstart")
    takes_overrides(sub, "train.steps=40")
    return sub


def takes_run(sub: argparse.ArgumentParser, *, with_overrides: bool = True) -> argparse.ArgumentParser:
    """Let a verb take a run, which its folder names or its config."""
    what = "run folder, such as runs/smoke; or the experiment file that it was trained from"
    sub.add_argument("config", type=as_config, metavar="RUN", help=what)
    if with_overrides:
        takes_overrides(sub, "parallel.device=cpu")
    return sub


def takes_overrides(sub: argparse.ArgumentParser, example: str) -> None:
    """Let a verb take overrides; the command line accepts them behind options too."""
    sub.add_argument("overrides", nargs="*", default=[], metavar="a.b=c", help=f"keys to change, such as {example}")


def takes_step(sub: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Let a verb take another checkpoint than the newest."""
    sub.add_argument("--step", type=int, help="use the checkpoint of this step instead of the newest")
    return sub
