"""What the verbs' arguments have in common."""

import argparse
from collections.abc import Callable
from pathlib import Path

Verbs = argparse._SubParsersAction
"""Where a verb is added: those of the command line, or the actions of one verb."""

RUN = "run folder or experiment file"


def verb(verbs: Verbs, name: str, function: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
    """Add a verb; its help is what its function says of itself."""
    text = (function.__doc__ or "").strip()
    sub = verbs.add_parser(name, help=text, description=text)
    sub.set_defaults(verb=function)
    return sub


def takes_config(sub: argparse.ArgumentParser, what: str = "experiment file") -> argparse.ArgumentParser:
    """Let a verb take a config and overrides."""
    sub.add_argument("config", type=Path, help=what)
    takes_overrides(sub, "train.steps=40")
    return sub


def takes_overrides(sub: argparse.ArgumentParser, example: str) -> None:
    """Let a verb take overrides; the command line accepts them behind options too."""
    sub.add_argument("overrides", nargs="*", metavar="a.b=c", help=f"keys to change, such as {example}")


def takes_step(sub: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Let a verb take another checkpoint than the newest."""
    sub.add_argument("--step", type=int, help="use the checkpoint of this step instead of the newest")
    return sub
