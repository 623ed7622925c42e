"""The command `chat`: talk to a checkpoint of a run."""

import argparse
from pathlib import Path

from trainer.commands.arguments import Subparsers, add_choice, add_command, add_run, choice_of
from trainer.commands.resolve import existing_run
from trainer.commands.sampling_arguments import add_sampling, check_sampling, sampling_of


def add(subparsers: Subparsers) -> None:
    """Add the command with its arguments."""
    example = "runs/smoke --system 'You are terse.'"
    sub = add_choice(add_run(add_command(subparsers, "chat", chat_command, example=example)))
    sub.add_argument("--system", help="what the model is told before the conversation")
    add_sampling(sub)


def chat_command(options: argparse.Namespace) -> int:
    """Talk to a run's newest checkpoint; with a pipe, one message a line."""
    check_sampling(options, "chat")
    directory = Path.cwd()  # before it changes to that of the run
    config, folder = existing_run(options)

    from trainer.training.chat_session import AnswerOptions
    from trainer.training.chat_terminal import Chat, chat_with_run

    answers = AnswerOptions(sampling=sampling_of(options), max_tokens=options.max_tokens, seed=options.seed)
    chat = Chat(answers=answers, system=options.system, choice=choice_of(options), directory=directory)
    chat_with_run(config, folder, chat)
    return 0
