"""The command `check-plugin`: run the contract checks on a plug-in."""

import argparse

from trainer.commands.arguments import Subparsers, add_command
from trainer.terminal import print_safe


def add(subparsers: Subparsers) -> None:
    """Add the command with its arguments."""
    example = "my_package.router:MyRouterConfig top_k=2"
    sub = add_command(subparsers, "check-plugin", check_plugin_command, example=example)
    sub.add_argument("plugin", metavar="MODULE:CLASS", help="config class of the plug-in, or its entry point's name")
    sub.add_argument("options", nargs="*", default=[], metavar="KEY=VALUE", help="keys of its config")


def check_plugin_command(options: argparse.Namespace) -> int:
    """Check that a router, dispatcher, source or other plug-in keeps its contract."""
    from trainer.contracts.plugin import check_plugin

    group, outcomes = check_plugin(options.plugin, options.options)
    print_safe(f"{options.plugin}: turnout.{group}")
    num_failed = 0
    for outcome in outcomes:
        num_failed += outcome.error is not None
        print_safe(
            f"{'FAILED ' if outcome.error else 'skipped' if outcome.is_skipped else 'ok     '}  {outcome.promise}"
        )
        if outcome.error:
            print_safe(f"         {outcome.name}: {outcome.error}")
    print_safe(f"{num_failed} check{'' if num_failed == 1 else 's'} failed" if num_failed else "all checks passed")
    return 1 if num_failed else 0
