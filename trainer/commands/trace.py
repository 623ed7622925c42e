"""The command `trace`: record a run's decisions and scores. Imports no torch."""

import argparse

from trainer.commands.arguments import Subparsers, add_choice, add_command, add_run, as_path, choice_of, whole
from trainer.commands.record_option import check_new_folder
from trainer.commands.resolve import existing_run, suggest_prepare
from trainer.errors import ConfigError
from trainer.routing_record.replay_rules import record_problem
from trainer.terminal import print_safe


def add(subparsers: Subparsers) -> None:
    """Add the command with its arguments."""
    sub = add_choice(add_run(add_command(subparsers, "trace", trace_command, example="runs/smoke --to traces/smoke")))
    sub.add_argument("--to", type=as_path, required=True, metavar="TRACE", help="new folder of the trace")
    what = "positions to read of each domain (all)"
    sub.add_argument("--max-tokens", type=whole, metavar="N", help=what)
    sub.add_argument("--split", choices=("held-out", "train"), default="held-out", help="text to read (held-out)")
    what = "experts to list for each token, best first, which limits --top-k of what-if (twice the model's k)"
    sub.add_argument("--choices", type=whole, metavar="M", help=what)


def trace_command(options: argparse.Namespace) -> int:
    """Record what the routers of a run's newest checkpoint decide, with scores and token ids (docs/traces.md)."""
    config, folder = existing_run(options)
    if (problem := record_problem(config.model.moe)) is not None:
        raise ConfigError(f"trace: {problem}; trace a run whose router has a fixed k")
    check_new_folder("--to", options.to)

    from trainer.training.trace_run import TraceOptions, trace_checkpoint

    chosen = TraceOptions(
        split=options.split, max_tokens=options.max_tokens, num_ranked=options.choices, choice=choice_of(options)
    )
    with suggest_prepare(config):
        manifest = trace_checkpoint(config, folder, options.to, chosen)
    files = manifest.files.values()
    tokens, size = sum(file.num_tokens for file in files), sum(file.size_bytes for file in files)
    print_safe(f"{options.to}: {tokens} tokens, {size / max(1, tokens):.1f} bytes each, in {len(files)} files")
    return 0
