"""The command `generate`: write text with a checkpoint of a run."""

import argparse

from trainer.commands.arguments import Subparsers, add_choice, add_command, add_run, choice_of
from trainer.commands.record_option import add_record, check_record_option
from trainer.commands.resolve import existing_run
from trainer.commands.sampling_arguments import add_sampling, check_sampling, sampling_of


def add(subparsers: Subparsers) -> None:
    """Add the command with its arguments."""
    example = "runs/smoke --prompt 'It was' --max-tokens 100"
    sub = add_choice(add_run(add_command(subparsers, "generate", generate_command, example=example)))
    sub.add_argument("--prompt", default="", help="text to continue; default: the start of a document")
    add_sampling(sub)
    add_record(sub)


def generate_command(options: argparse.Namespace) -> int:
    """Generate text with a run's newest checkpoint."""
    check_sampling(options, "generate")
    config, folder = existing_run(options)
    check_record_option(options, config)

    from trainer.training.generate_text import generate_text

    generate_text(
        config,
        folder,
        prompt=options.prompt,
        max_tokens=options.max_tokens,
        sampling=sampling_of(options),
        seed=options.seed,
        choice=choice_of(options),
        record=options.record,
    )
    return 0
